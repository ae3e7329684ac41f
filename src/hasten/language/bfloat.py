from hasten.nn.bfloat import *  # noqa: F403
from hasten.nn.bfloat import bits_of_float, float_of_bits  # noqa: F401
