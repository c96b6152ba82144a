"""What a user would pick instead of ABRA: published methods as small Keras layers, objectives and functions.

Independent implementations after the published formulas; each file names its source and the constants of that source.
For comparisons (`recipes/ladder.py`), not part of the package.
"""
