"""What a run would do, told before it is started."""
