"""One budget, one set of drawn pictures, seven ways to learn it: what each system buys.

data.py draws the pictures, models.py trains and draws, measure.py measures, table.py writes the
table and the figures of docs/comparison.md. Begin with command.py.
"""
