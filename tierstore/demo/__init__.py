"""`tierstore demo`: a byte-level transformer learns Python's own sources while its weights and optimizer state live on three tiers.

`model.py` and `corpus.py` hold the mathematics and the text and import nothing of tierstore, so that `plain.py`, the all-resident
run that `--check` compares with, can share them. `train.py` is the loop by hand over the store's public calls: the file to read first.
"""
