"""`tierstore demo --model smollm2`: fine-tunes a language model of 135 million parameters on three tiers.

`train.py` is the script that a user would write over `tierstore.training`: the file to read first. `convert.py` makes the model's files,
`text.py` and `recipe.py` say what is learnt and how; they import nothing of tierstore, so that `plain.py`, the all-resident run that
`--check` compares with, can share them.
"""
