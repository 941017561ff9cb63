"""Steps of TorchRec's DLRM, its tables divided among ranks, on the CPU: whole tables, since it divides none by rows there.

Run by ``benchmarks.gmeta_speed``, under torchrun, by a Python of its own that has torchrec and fbgemm-gpu-cpu, and nothing of
this project. ``python torchrec_dlrm.py FILE BATCH STEPS RESULT`` reads a safetensors file with ``sparse`` int64 (N, F), ``dense``
float (N, D), ``label`` float (N,) and ``field_dims`` (F,), and writes the seconds of each step of the slowest rank as JSON. Sizes
are those of ``gmeta/movielens``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingType
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

DIM, BOTTOM, TOP = 16, [64, 16], [64, 32, 1]


def main() -> None:
    """Train, and write."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    data = load_file(sys.argv[1])
    batch, steps = map(int, sys.argv[2:4])
    dims = data["field_dims"].tolist()
    names = [f"field{number}" for number in range(len(dims))]
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", embedding_dim=DIM, num_embeddings=dim, feature_names=[name])
        for name, dim in zip(names, dims, strict=True)
    ]
    torch.manual_seed(0)
    bags = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    model = DLRMTrain(DLRM(bags, data["dense"].shape[1], BOTTOM, TOP, dense_device=device))
    whole = {f"t_{name}": ParameterConstraints(sharding_types=[ShardingType.TABLE_WISE.value]) for name in names}
    planner = EmbeddingShardingPlanner(topology=Topology(world_size=ranks, compute_device="cpu"), constraints=whole)
    sharder = EmbeddingBagCollectionSharder(fused_params={"learning_rate": 0.1})
    plan = planner.collective_plan(model, [sharder], dist.GroupMember.WORLD)
    divided = DistributedModelParallel(module=model, device=device, plan=plan, sharders=[sharder])
    dense = [(name, value) for name, value in divided.named_parameters() if "embedding_bags" not in name]
    optimizer = KeyedOptimizerWrapper(dict(dense), lambda params: torch.optim.Adam(params, lr=2e-3))
    seconds = []
    lengths = torch.ones(len(dims) * batch, dtype=torch.int32)
    for step in range(steps):
        begin = (step * ranks + rank) * batch % (len(data["label"]) - batch)
        rows = slice(begin, begin + batch)
        start = time.perf_counter()
        ids = KeyedJaggedTensor(names, data["sparse"][rows].T.contiguous().view(-1), lengths=lengths)
        optimizer.zero_grad()
        loss, _ = divided(Batch(data["dense"][rows], ids, data["label"][rows]))
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    if rank == 0:
        Path(sys.argv[4]).write_text(json.dumps(slowest.tolist()))
    dist.barrier()
    os._exit(0)  # threads of TorchRec sometimes abort a process that ends


class Batch:
    """What TorchRec's training module takes."""

    def __init__(self, dense: torch.Tensor, ids: KeyedJaggedTensor, label: torch.Tensor) -> None:
        self.dense_features, self.sparse_features, self.labels = dense, ids, label


if __name__ == "__main__":
    main()
