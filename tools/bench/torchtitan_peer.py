"""torchtitan 0.2.2: its Qwen3 or Llama 3, parallelize function, compiled blocks and loss, optimizer and step.

Its settings are `training.dtype = "bfloat16"` (weights, gradients and states, as ours), compile of model and loss, and
`sdpa`, whose first choice is cuDNN. `recompute: selective` is its `op`: every second product and attention are kept.
One GPU runs without the autocast that its train.py has there: all is bf16 already. 0.3.0 needs a newer torch than 2.11.
With a `mesh` in the work, a process of parallel.py: FSDP2 over all processes, gradients summed in fp32 and clipped.
"""

import json
import os
from collections.abc import Callable
from importlib.metadata import version
from types import SimpleNamespace

import common
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtitan.config import JobConfig
from torchtitan.config.job_config import Comm
from torchtitan.distributed import ParallelDims, parallel_dims
from torchtitan.distributed import utils as titan
from torchtitan.models import llama3, qwen3
from torchtitan.models.llama3.model.args import RoPEScalingArgs
from torchtitan.protocols.state_dict_adapter import StateDictAdapter
from torchtitan.protocols.train_spec import TrainSpec
from torchtitan.tools.utils import set_default_dtype

RECOMPUTE = ("none", "selective", "full")
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def main() -> None:
    work = common.job()
    if "mesh" in work:
        return several(work)
    model, optimizer, loss_of, _ = build(work, common.config_of(work["shape"]), 1)
    count = work["rows"] * (work["seq_len"] - 1)

    def step(ids: Tensor) -> tuple[float, float]:
        optimizer.zero_grad()
        logits = model(ids)
        loss = loss_of(logits, common.shifted(ids)) / count
        del logits
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()], foreach=True)
        optimizer.step()
        return loss.item(), norm.item()

    common.measure("torchtitan", work, step, versions())


def versions() -> dict[str, str]:
    return {"torchtitan": version("torchtitan")}


def several(work: dict) -> None:
    """One process of several: the loop and the row of parallel_step.py around torchtitan's step."""
    import parallel_step

    assert work["kind"] == "full" and set(work["mesh"]) == {"dp_shard"}, "written for dp_shard and every weight"
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if common.DEVICE.type == "cuda":
        common.DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(common.DEVICE)
    parallel_dims.device_type = titan.device_type = common.DEVICE.type  # it takes CUDA for granted
    titan.init_distributed(Comm(trace_buf_size=0))  # without a record of what was communicated
    config = common.config_of(work["shape"]) | (parallel_step.TINY if work["tiny"] else {})
    model, optimizer, loss_of, sizes = build(work, config, world)
    for module in model.modules():
        if common.DEVICE.type == "cpu" and isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
    own, count = work["rows"] // world, torch.tensor(work["rows"] * work["seq_len"], device=common.DEVICE)

    def step(ids: Tensor) -> tuple[float, float]:
        optimizer.zero_grad()
        losses = []
        for micro in ids[rank * own : (rank + 1) * own].split(work["micro_rows"]):
            logits = model(micro[:, :-1].contiguous())
            loss = loss_of(logits, micro[:, 1:].contiguous()) / count
            del logits
            loss.backward()
            losses.append(loss.detach())
        norm = titan.clip_grad_norm_(list(model.parameters()), 1.0, foreach=True)
        optimizer.step()
        return titan.dist_sum(torch.stack(losses).sum(), sizes.get_mesh("loss")), norm.item()

    run = SimpleNamespace(device=common.DEVICE, world=world)
    row = parallel_step.measure(step, run, work, config["vocab_size"])
    row["versions"] |= versions()
    if rank == 0:
        print("ROW " + json.dumps({"case": work["case"], "work": work, "processes": world, **row}), flush=True)
    torch.distributed.destroy_process_group()


def build(
    work: dict, config: dict, world: int
) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[Tensor, Tensor], Tensor], ParallelDims]:
    """The model with everybody's weights, its optimizer and loss, and torchtitan's sizes of the mesh, in the order of
    its train.py: made on meta, recomputed, compiled and sharded, then given memory and values."""
    job = settings(work, world)
    sizes = ParallelDims(dp_replicate=1, dp_shard=world, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=world)
    spec, args = described(config)
    args.update_from_config(job)
    with torch.device("meta"), set_default_dtype(torch.bfloat16):
        model = spec.model_cls(args)
    model = spec.parallelize_fn(model, sizes, job)
    model.to_empty(device=common.DEVICE.type)
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    model.train()
    same_weights(model, spec.state_dict_adapter(args, None))
    optimizer = spec.build_optimizers_fn([model], job.optimizer, sizes)
    return model, optimizer, spec.build_loss_fn(job, parallel_dims=sizes), sizes


def settings(work: dict, world: int) -> JobConfig:
    """The job as torchtitan's command line would give it."""
    assert work["recompute"] in RECOMPUTE, f"torchtitan recomputes {RECOMPUTE}"
    job = JobConfig()
    job.training.seq_len, job.training.dtype = work["seq_len"], "bfloat16"
    job.compile.enable = True
    job.activation_checkpoint.mode = work["recompute"]
    job.activation_checkpoint.selective_ac_option = "op"
    job.parallelism.data_parallel_shard_degree = world
    job.optimizer.lr, job.optimizer.weight_decay = 1e-4, 0.0
    return job


def described(config: dict) -> tuple[TrainSpec, qwen3.Qwen3ModelArgs | llama3.TransformerModelArgs]:
    """torchtitan's recipe for a family, and its sizes from a published config.json."""
    width, hidden, theta = config["hidden_size"], config["intermediate_size"], config["rope_theta"]
    sizes = {
        "dim": width, "n_layers": config["num_hidden_layers"], "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"], "vocab_size": config["vocab_size"],
        "norm_eps": config["rms_norm_eps"], "rope_theta": theta,
    }  # fmt: skip
    if config["model_type"] == "qwen3":
        tied = config["tie_word_embeddings"]
        more = {"head_dim": config["head_dim"], "hidden_dim": hidden, "enable_weight_tying": tied}
        return qwen3.get_train_spec(), qwen3.Qwen3ModelArgs(**sizes, **more)
    assert config["model_type"] == "llama" and not config["tie_word_embeddings"], "written for Qwen3 and Llama 3.1"
    scaling = config["rope_scaling"]
    names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    rope = RoPEScalingArgs(scaling["factor"], **{name: scaling[name] for name in names})
    more = {"multiple_of": 128, "ffn_dim_multiplier": hidden / int(8 * width / 3), "rope_scaling_args": rope}
    return llama3.get_train_spec(), llama3.TransformerModelArgs(**sizes, **more)


@torch.no_grad()
def same_weights(model: nn.Module, adapter: StateDictAdapter) -> None:
    """Everybody's weights, one at a time through torchtitan's adapter of Hugging Face checkpoints."""
    for name, parameter in model.named_parameters():
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        (theirs,) = adapter.to_hf({name: torch.empty(parameter.shape, device="meta")})
        value = common.weight(theirs, parameter.shape)
        value = adapter.from_hf({"lm_head.weight": value, theirs: value})[name]  # a tied head is asked for too
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)


if __name__ == "__main__":
    main()
