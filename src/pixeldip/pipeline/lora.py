"""LoRA weights of a pipeline's model (Hu et al. 2022): loaded, fused and saved, by PEFT as elsewhere in diffusers."""

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import is_peft_available
from torch import Tensor

from ..errors import UserError, in_one_line
from ..run_folder import newest_lora
from ..terminal import quieted


class LoRAMixin(LoraBaseMixin):
    """The LoRA methods of a pipeline whose `model` is a `DiP`."""

    _lora_loadable_modules = ["model"]
    _fused_for_good: frozenset[str] | set[str] = frozenset()
    """Names of adapters that were fused when they were unloaded."""

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, Tensor],
        adapter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds LoRA weights to the model: a folder, file, hub id or state dict as `save_lora_weights` writes them.

        Further keywords go to the model's `load_lora_adapter`; `set_adapters`, `fuse_lora` and
        `unload_lora_weights` work as elsewhere in diffusers.

        Raises:
            UserError: if PEFT is not installed, there are no LoRA weights, they belong to another model, or this one is
                in int8 or has fused adapters, which loading others would take out of its weights.
        """
        check_peft()
        if fused := self._fused_now():
            raise UserError(
                f"LoRA weights: {', '.join(sorted(fused))} would be fused no longer; call unload_lora_weights() first, "
                "which leaves what is fused in the weights, or unfuse_lora()"
            )
        if self.model.in_int8:
            raise UserError("LoRA weights: layers in int8 take none; load and fuse them before quantize_to_int8()")
        kwargs.setdefault("use_safetensors", True)
        given, before = pretrained_model_name_or_path_or_dict, self.model.adapters
        if not isinstance(given, dict):
            given = os.path.expanduser(str(given))
        where = "LoRA weights" if isinstance(given, dict) else f"LoRA weights {given}"
        try:
            with quieted("diffusers.loaders.peft", logging.CRITICAL):  # what it says is in its exception, too
                self.model.load_lora_adapter(given, prefix=None, adapter_name=adapter_name, _pipeline=self, **kwargs)
            found = kwargs.get("hotswap") or self.model.adapters != before
        except IndexError:  # of diffusers, where it looks for the first rank
            found = False
        except Exception as error:  # diffusers, PEFT, safetensors and the hub's client raise many kinds
            if not isinstance(given, dict) and (lora := newest_lora(Path(given))):
                raise UserError(f"{where}: a run's folder; LoRA weights of its newest checkpoint are {lora}") from error
            if mismatch := re.search("size mismatch for .*", str(error)):
                raise UserError(f"{where}: of a model of other sizes ({mismatch[0]})") from error
            raise UserError(f"{where}: cannot be loaded ({in_one_line(error)})") from error
        if not found:
            raise UserError(f"{where}: no tensors of LoRA are in it")

    def fuse_lora(
        self,
        components: str | Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """As elsewhere in diffusers; by default of the model, the only component that adapters go to.

        Raises:
            UserError: if no adapters are loaded, or none of a name.
        """
        there = self.model.adapters
        if not there:
            raise UserError("fuse_lora: no LoRA weights are loaded; load_lora_weights() does it")
        if unknown := [name for name in adapter_names or () if name not in there]:
            raise UserError(f"fuse_lora: no adapter {unknown[0]!r}; there are {', '.join(there)}")
        super().fuse_lora(self._components(components), lora_scale, safe_fusing, adapter_names, **kwargs)
        self.model.forget_kernels()

    def unfuse_lora(self, components: str | Sequence[str] | None = None, **kwargs: Any) -> None:
        """As elsewhere in diffusers, likewise; what was fused before the last `unload_lora_weights` stays."""
        super().unfuse_lora(self._components(components), **kwargs)
        self._merged_adapters = self._merged_adapters | self._fused_for_good
        self.model.forget_kernels()

    def unload_lora_weights(self) -> None:
        """As elsewhere in diffusers: what is fused stays in the weights, the rest is gone."""
        self._fused_for_good = self._fused_for_good | self._fused_now()
        super().unload_lora_weights()
        self._merged_adapters = set(self._fused_for_good)
        self.model.forget_kernels()

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """As elsewhere in diffusers: what is fused stays in the weights."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        self._fused_for_good = self._fused_for_good | (self._fused_now() & names)
        super().delete_adapters(adapter_names)
        self.model.forget_kernels()

    def _components(self, names: str | Sequence[str] | None) -> list[str]:
        return [names] if isinstance(names, str) else list(names or self._lora_loadable_modules)

    def _fused_now(self) -> set[str]:
        """The loaded adapters that are in the weights."""
        return {name for module in self.model.modules() for name in getattr(module, "merged_adapters", ())}

    def save_lora_weights(self, save_directory: str | os.PathLike, adapter_name: str | None = None) -> None:
        """Writes one adapter's weights to `pytorch_lora_weights.safetensors` in a folder.

        Args:
            adapter_name: by default that of the only adapter there is.

        Raises:
            UserError: if PEFT is not installed, there is no such adapter, or which one is not said.
        """
        check_peft()
        adapters = self.model.adapters
        if adapter_name is None and len(adapters) == 1:
            (adapter_name,) = adapters
        if adapter_name not in adapters:
            there = f"there are {', '.join(adapters)}" if adapters else "none is loaded"
            raise UserError(f"LoRA adapter {adapter_name or 'to save'}: name one of those loaded; {there}")
        with quieted("diffusers.models.modeling_utils"):  # it warns of a cast that is none
            self.model.save_lora_adapter(os.path.expanduser(save_directory), adapter_name)


def check_peft(what: str = "LoRA") -> None:
    """Raises UserError, which says what needs it, unless PEFT is installed."""
    if not is_peft_available():
        raise UserError(f"{what} needs PEFT: pip install 'pixeldip[lora]'")
