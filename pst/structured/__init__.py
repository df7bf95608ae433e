"""Heads and feed-forward neurons that are learned like masks and then removed, so that every runtime is faster.

    units.py        which rows and columns make up a unit, by the architecture's layout; what a unit costs
    choose.py       the units of lowest score go; their one mask stands in the columns of the output weight
    calibration.py  what the loss of a unit would cost, and what the others make up for
    remove.py       masked units leave the weights; a plain model is made as small as a removed one
    report.py       what config.json says is left
    storage.py      a folder is opened by it

    model = pst.load_structured("runs/pruned/model")                   AutoModelForSequenceClassification
    model = pst.load_structured("runs/pruned/model", "AutoModel")      any of transformers' Auto classes

Importing this package needs no torch; its modules do, but for report.py.
"""
