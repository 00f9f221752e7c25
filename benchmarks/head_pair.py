"""The U-Net head of a guided pair, plain and by each way of saving: a table, and one JSON line.

    python benchmarks/head_pair.py [--model dip-b/16] [--precision auto] [--rounds 11] [--device auto] [--out FILE]

For all patches of one image of the preset's size and two contexts of each, as a guided step has them. Plain code runs
both branches, every layer by itself. Ours computes the way down and the skips' half of the convolutions once for both,
and composes each pair of convolutions on the way up into one. Contenders take turns; ratios are within rounds.
"""

import argparse
import copy
from pathlib import Path

import torch
from record import put_out
from torch import Tensor, nn

from pixeldip import DiP
from pixeldip.bench.commands import as_compiled_as_told
from pixeldip.bench.release import ReleaseDiP
from pixeldip.bench.timing import Step, Times, ratio, take_turns
from pixeldip.processes import choose_device, choose_precision, precision_name


def layer_by_layer(head: nn.Module) -> nn.Module:
    """A copy that composes no kernels: layers with hooks are called themselves."""
    head = copy.deepcopy(head)
    for layer in head.modules():
        layer.register_forward_hook(lambda layer, args, out: None)
    return head


def compiled(head: nn.Module) -> nn.Module:
    head = copy.deepcopy(head)
    head.compile(dynamic=False)
    return head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dip-b/16")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.manual_seed(0)
    device = choose_device(asked.device)
    precision = choose_precision(asked.precision, device)
    model = DiP.from_preset(asked.model)
    nn.init.normal_(model.detailer.out.weight, std=0.02)  # it starts at zero, where all are equal
    as_released = ReleaseDiP(model).detailer.to(device, precision)
    ours = model.detailer.eval().to(device, precision)
    side, hidden = model.config.patch_size, model.config.hidden_size
    patches = torch.randn(256, model.config.in_channels, side, side, device=device, dtype=precision)
    contexts = torch.randn(2, len(patches), hidden, device=device, dtype=precision)
    channels_last = copy.deepcopy(as_released).to(memory_format=torch.channels_last)
    heads = {
        "plain": as_released,
        "plain, channels last": channels_last,
        "plain, channels last, compiled": compiled(channels_last),
        "way down shared": layer_by_layer(ours),
        "ours": ours,
        "ours, compiled": compiled(ours),
    }

    def of_both(head: nn.Module, plain: bool) -> Step:
        @torch.no_grad()
        def step() -> Tensor:
            if not plain:
                return head(patches, contexts)
            both = head(patches.repeat(2, 1, 1, 1), contexts.flatten(0, 1))
            return both.unflatten(0, contexts.shape[:2])

        return step

    steps = {name: of_both(head, name.startswith("plain")) for name, head in heads.items()}
    expected = steps["plain"]()
    errors = {name: ((step() - expected).std() / expected.std()).item() for name, step in steps.items()}
    with as_compiled_as_told():
        seconds = take_turns(steps, asked.rounds, device)
    rows = {}
    for name, taken in seconds.items():
        times, times_faster = Times.of(taken), ratio(seconds, "plain", name)
        rows[name] = {"milliseconds": 1e3 * times.median, "spread": 1e3 * times.spread, "times_faster": times_faster}
        print(f"{name:<32} {1e3 * times.median:7.1f} ± {1e3 * times.spread:.1f} ms {times_faster:5.2f}x")
    arguments = {name: value for name, value in vars(asked).items() if name not in ("out", "device")}
    found = {"precision": precision_name(precision), "heads": rows, "errors": errors}
    put_out({"benchmark": "head_pair", **arguments, **found}, device, asked.out)


if __name__ == "__main__":
    main()
