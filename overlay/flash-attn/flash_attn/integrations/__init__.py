"""Attention without softmax inside other packages. Each module here imports its package only when it is
used.
"""
