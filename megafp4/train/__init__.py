"""In what order: putting a run together, the loop, and what a run tells its user.

Read :mod:`~megafp4.train.loop` first. :mod:`~megafp4.train.build` makes the parts that it moves;
:mod:`~megafp4.train.state` is what survives a kill.
"""
