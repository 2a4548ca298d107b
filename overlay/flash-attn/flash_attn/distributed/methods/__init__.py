"""How the ranks compute a call together. Each method is a module with the same functions:

    obstacle(problem)                   a text that says why the method can't run the call; None if it can
    moved(problem, backward)            the bytes that a rank receives in the forward or the backward pass
    blocks(problem)                     blocks like those that it will run, for the choice of their backend
    forward(problem)                    (out, kept): this rank's rows, and the tensors for the backward pass
    backward(problem, dout, kept)       (dq, dk, dv) of this rank's tokens

No choice and no count depends on the rank, so that all ranks agree.
"""

from types import ModuleType

from . import allgather, ring, state, ulysses

# Of two that move as much, "auto" takes the first.
MODULES: dict[str, ModuleType] = {"state": state, "ulysses": ulysses, "allgather": allgather, "ring": ring}
