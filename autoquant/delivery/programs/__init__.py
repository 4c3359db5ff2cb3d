"""Plans as programs that run with PyTorch alone.

Other targets hold the numbers of a plan, and an engine multiplies with kernels of its own. A
program holds what the plan computes, kernels included. So there is no table of schemes here and no
neutral form, and a `Target` with its `Writer` does not fit: what decides is whether the operators
that a kernel calls exist without Python (`operators.py`).
"""
