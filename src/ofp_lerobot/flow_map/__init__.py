"""The mathematics of one-step flow policies: pure functions over tensors, no network inside.

Time convention (LeRobot's and openpi's): t = 1 is noise, t = 0 is the action,
x_t = t·ε + (1 − t)·a, and the velocity of a sample's straight path is v = ε − a.
The paper runs the other way, s = 1 − t.
"""
