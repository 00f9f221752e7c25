"""The processes of a command: one by default, as many as torchrun starts."""

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .errors import UserError
from .heartbeat import heartbeat


@dataclass(frozen=True)
class Processes:
    """This process among those of the command."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean over all processes of a tensor that each of them has; written into this one."""
        if self.world_size > 1:
            dist.all_reduce(value)
            value /= self.world_size
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in some process."""
        if self.world_size == 1:
            return flag
        return bool(self.mean(torch.tensor(float(flag), device=self.device)).item())

    def all_gather(self, value: Any) -> list[Any]:
        """What each process passes, a picklable object, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def gather(self, value: Any) -> list[Any]:
        """As `all_gather`, but for the main process alone; the others get an empty list."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values)
        return values or []

    def broadcast(self, value: Any) -> Any:
        """What the main process passes, a picklable object."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def on_main(self, work: Callable[[], Any]) -> Any:
        """What `work`, which the main process alone calls, returns; a UserError it raises is raised in all."""
        return self.broadcast(self.together(lambda: work() if self.is_main else None))

    def together(self, work: Callable[[], Any]) -> Any:
        """What `work` returns in this process; a UserError that any of them raises is raised in all."""
        if self.world_size == 1:
            return work()
        value, mistake = None, None
        try:
            value = work()
        except UserError as error:
            mistake = str(error)
        if mistakes := [text for text in self.all_gather(mistake) if text is not None]:
            raise UserError(mistakes[0])
        return value

    def main_first(self, load: Callable[[], Any]) -> Any:
        """What `load` returns in this process: the main one goes first and downloads what the others then find.

        A UserError in one of them is raised in all.
        """
        first = self.together(lambda: load() if self.is_main else None)
        return self.together(lambda: first or load())

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device for "auto", "cpu", "cuda" or "mps".

    Raises:
        UserError: if it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("device cuda: torch sees no CUDA device here; use cpu, or auto")
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine has no GPU: torch sees {torch.cuda.device_count()}; "
                f"start at most that many with torchrun --nproc-per-node"
            )
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps: not available here; use cpu, or auto")
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """float32, bfloat16 or int8; "auto" is bfloat16 where the device has instructions for it, on a CPU fast ones.

    Raises:
        UserError: if the device has no instructions for int8.
    """
    if name == "int8":
        if not computes_in_int8(device):
            raise UserError(f"precision int8: needs a CPU with AVX512-VNNI, and this is none ({device.type}); use bf16")
        return torch.int8
    if name == "fp32" or (name == "auto" and not _gains_from_bf16(device)):
        return torch.float32
    return torch.bfloat16


def computes_in_int8(device: torch.device) -> bool:
    """Without these instructions a CPU is slower, and its sums may overflow. On CUDA devices it has not been tried."""
    return device.type == "cpu" and torch.cpu._is_vnni_supported()


def precision_name(precision: torch.dtype) -> str:
    """As records and pages spell it, for instance "bfloat16"."""
    return str(precision).removeprefix("torch.")


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """The context in which float32 weights compute in `precision`; float32 changes nothing."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def _gains_from_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and _cpu_gains_from_bf16()


@functools.cache
def _cpu_gains_from_bf16() -> bool:
    """Whether the main process's CPU multiplies faster in bf16 than in float32. By the same instructions some are
    twice as fast, and some half as fast (benchmarks/LOG.md)."""
    if not dist.is_initialized():
        return _multiplies_faster_in_bf16()
    answer = [dist.get_rank() == 0 and _multiplies_faster_in_bf16()]
    dist.broadcast_object_list(answer)
    return answer[0]


def _multiplies_faster_in_bf16() -> bool:
    """By the time that one thread spends on products of a small model's size: what else is at work on the machine does
    not count, and so does not change the answer."""
    if not torch.cpu._is_avx512_bf16_supported():
        return False
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(7):
            for precision, taken in seconds.items():
                tokens, weight = torch.ones(512, 768, dtype=precision), torch.ones(768, 768, dtype=precision)
                began = time.thread_time()
                torch.mm(tokens, weight)
                taken.append(time.thread_time() - began)
    finally:
        torch.set_num_threads(threads)
    return min(seconds[torch.bfloat16]) < min(seconds[torch.float32])


@contextlib.contextmanager
def exact_matmuls() -> Iterator[None]:
    """No TensorFloat-32, no float16 sums and no convolutions chosen by their time in here; CUDA may have been allowed
    each.

    TensorFloat-32 shifts the features of an evaluation by 1e-3.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    parts = matmul, cudnn.conv  # torch's older switches cannot be read once somebody has used these
    before = [part.fp32_precision for part in parts]
    half_sums, by_time = matmul.allow_fp16_reduced_precision_reduction, cudnn.benchmark
    try:
        for part in parts:
            part.fp32_precision = "ieee"
        matmul.allow_fp16_reduced_precision_reduction = cudnn.benchmark = False
        yield
    finally:
        for part, precision in zip(parts, before):
            part.fp32_precision = precision
        matmul.allow_fp16_reduced_precision_reduction, cudnn.benchmark = half_sums, by_time


_groups = itertools.count()  # of this process; all processes of a command open as many


@contextlib.contextmanager
def start_processes(device_name: str) -> Iterator[Processes]:
    """In here this process is one of those that torchrun describes in the environment, or the only one.

    Raises:
        UserError: if the device is not there, or the environment describes only part of a process group.
    """
    variables = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ]
    if "WORLD_SIZE" not in os.environ and "RANK" not in os.environ:
        yield Processes(0, 1, choose_device(device_name))
        return
    if len(variables) < 3:
        raise UserError(
            f"the environment sets {' and '.join(variables)} but not all of RANK, WORLD_SIZE and LOCAL_RANK: "
            "start with torchrun, or unset them"
        )
    try:
        rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE or LOCAL_RANK in the environment: {error}; start with torchrun") from None
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world_size > 1 and missing:
        raise UserError(
            f"the environment sets WORLD_SIZE {world_size} but not {' and '.join(missing)}, where the processes meet: "
            "start with torchrun, or unset it"
        )
    device = choose_device(device_name, local_rank)
    if world_size == 1:
        yield Processes(0, 1, device)
        return
    if device.type == "mps":
        raise UserError("several processes cannot share an MPS device: use the cpu device, or one process")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # the others may wait for hours while the main process computes; the heartbeat notices sooner who is gone
    timeout = timedelta(hours=12)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = _fresh_store()
    with heartbeat(store, rank, world_size):
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        leave = dist.destroy_process_group
        try:
            if device.type == "cpu":
                _cpu_gains_from_bf16.cache_clear()
                _cpu_gains_from_bf16()  # of the main process, while all are here to be told
            yield Processes(rank, world_size, device)
        except BaseException:
            if backend == "nccl":  # which ends a group only together; one that failed alone would wait for the others
                leave = dist.distributed_c10d._abort_process_group
            raise
        finally:
            leave()


def _fresh_store() -> dist.Store:
    """A part of torchrun's store that neither earlier groups nor starts before a restart have written to.

    Several machines count their restarts separately, so there torchrun must open another store for each start.
    """
    store, _, _ = next(dist.rendezvous("env://"))
    one_machine = os.environ.get("GROUP_WORLD_SIZE") == "1"
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_machine else "0"
    return dist.PrefixStore(f"start {start}, group {next(_groups)}", store)
