"""The store on a drive that forgets, and power that goes off at every single operation."""
