"""Train a small model on one long sequence that is cut over several processes or GPUs.

    torchrun --nproc-per-node 2 examples/context_parallel.py            # gloo on the CPU, NCCL where GPUs are
    torchrun --nproc-per-node 4 examples/context_parallel.py --method ring --activation silu --layout zigzag
    torchrun --nproc-per-node 2 examples/context_parallel.py --fsdp    # weights in shares, too

Two blocks of attention without softmax and a linear layer learn to repeat a random sequence. Every process
has a share of the tokens, and the gradients of the weights are added up: by an all-reduce, or by FSDP2, which
leaves each process a share of the weights. At the end rank 0 trains the same model on the whole sequence by
itself, and compares the losses.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from flash_attn import explain, flash_attn_func
from flash_attn.distributed import ContextParallel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

HEADS, HEAD_DIM, VOCABULARY = 4, 16, 64


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.before, self.after = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, options: dict) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(-3)
        out = flash_attn_func(q, k, v, causal=True, use_softmax=False, **options)
        return x + self.out(self.after(out.flatten(-2)))


class Model(nn.Module):
    def __init__(self, seqlen: int) -> None:
        super().__init__()
        dim = HEADS * HEAD_DIM
        self.tokens, self.positions = nn.Embedding(VOCABULARY, dim), nn.Embedding(seqlen, dim)
        self.blocks, self.head = nn.ModuleList([Block(dim), Block(dim)]), nn.Linear(dim, VOCABULARY)

    def forward(self, tokens: Tensor, positions: Tensor, options: dict) -> Tensor:
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x, options)
        return self.head(x)


def train(tokens: Tensor, targets: Tensor, positions: Tensor, options: dict, args, group=None) -> list[float]:
    """Return the loss of each step. tokens, targets: (batch, tokens of this rank)."""
    torch.manual_seed(0)
    model = Model(args.seqlen).to(tokens.device)
    in_shares = args.fsdp and group is not None
    if in_shares:
        mesh = init_device_mesh(tokens.device.type, (dist.get_world_size(),))
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(args.steps):
        with torch.autocast("cuda", torch.bfloat16, enabled=tokens.is_cuda):
            logits = model(tokens, positions, options)
        # Each rank has a part of the sum over all tokens.
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum") / args.seqlen
        optimizer.zero_grad()
        # FSDP2 divides gradients by the ranks, but the loss is a sum over them.
        (loss * dist.get_world_size() if in_shares else loss).backward()
        if group is not None:
            for parameter in () if in_shares else model.parameters():
                dist.all_reduce(parameter.grad, group=group)
            dist.all_reduce(loss.detach(), group=group)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seqlen", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layout", default="zigzag", choices=["contiguous", "zigzag"])
    parser.add_argument("--method", default="auto", choices=["auto", "state", "ulysses", "allgather", "ring"])
    parser.add_argument("--activation", default="identity")
    parser.add_argument("--fsdp", action="store_true", help="give each process a share of the weights")
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    device = torch.device("cuda" if cuda else "cpu")

    # The plan: which tokens are here. Positions are those in the whole sequence.
    cp = ContextParallel(group, args.layout, seqlen=args.seqlen, method=args.method)
    options = {"activation": args.activation, "normalization": 1 / args.seqlen}
    if args.activation == "identity":
        options["algorithm"] = "linear"

    whole = torch.randint(VOCABULARY, (1, args.seqlen + 1), generator=torch.Generator().manual_seed(1)).to(
        device
    )
    tokens, targets = whole[:, :-1], whole[:, 1:]
    if rank == 0:
        dtype = torch.bfloat16 if cuda else torch.float32
        sample = torch.empty(1, cp.tokens, HEADS, HEAD_DIM, dtype=dtype, device=device, requires_grad=True)
        asked = {"causal": True, "use_softmax": False, "context_parallel": cp, **options}
        print(explain(flash_attn_func, sample, sample, sample, **asked))

    here = {**options, "context_parallel": cp}
    losses = train(cp.shard(tokens), cp.shard(targets), cp.positions.to(device), here, args, group)
    if rank == 0:
        alone = train(tokens, targets, torch.arange(args.seqlen, device=device), options, args)
        print("step  loss over the ranks  loss on one device")
        for step in (0, args.steps // 2, args.steps - 1):
            print(f"{step:4d}  {losses[step]:19.6f}  {alone[step]:18.6f}")
        worst = max(abs(x - y) for x, y in zip(losses, alone))
        print(f"largest difference {worst:.1e}")
        if not worst < (2e-2 if cuda else 1e-3):
            raise SystemExit("the losses differ")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
