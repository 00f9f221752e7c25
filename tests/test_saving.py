"""Pipelines and adapters, saved and loaded again."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from pixeldip import DiP, DiPPipeline, UserError

from .conftest import TINY_MODEL


def test_saving_takes_what_it_takes_elsewhere(pipeline: DiPPipeline, tmp_path: Path) -> None:
    def check(**which: str) -> None:
        theirs = DiPPipeline.from_pretrained(tmp_path, **which).model.state_dict()
        assert all(torch.equal(theirs[name], value) for name, value in pipeline.model.state_dict().items())

    pipeline.save_pretrained(tmp_path, variant="fp16", max_shard_size="40KB")
    parts = [path.name for path in (tmp_path / "model").glob("*.safetensors")]
    assert len(parts) > 1 and all(".fp16" in name for name in parts)
    check(variant="fp16")
    check()  # as the commands load it, which know of no variants
    pipeline.save_pretrained(tmp_path, variant="fp16")  # in one file, where the parts were
    check(variant="fp16")
    check()
    pipeline.save_pretrained(tmp_path, variant="fp16", max_shard_size="40KB")  # and back
    check(variant="fp16")
    assert sorted(path.name for path in (tmp_path / "model").glob("*.safetensors")) == sorted(parts)
    pipeline.save_pretrained(tmp_path, variant="ema")
    check(variant="ema")
    with pytest.raises(UserError, match=r'variants ema and fp16; say in Python which, .* variant="ema"\), or keep'):
        check()
    pipeline.save_pretrained(tmp_path)
    check()


def test_numbers_of_numpy_are_saved_so_that_they_load_again(tmp_path: Path) -> None:
    own = {"num_inference_steps": np.int64(3), "guidance_interval": np.array([0.0, 0.5])}
    names = np.arange(2)
    pipeline = DiPPipeline(DiP(**TINY_MODEL, num_classes=2), height=np.int64(16), class_names=names, sampling=own)
    pipeline.save_pretrained(tmp_path)
    again = DiPPipeline.from_pretrained(tmp_path)
    assert (again.config.height, again.config.class_names, again.default_settings.steps) == (16, ["0", "1"], 3)
    assert again.default_settings.guidance_interval == (0.0, 0.5)


def test_the_users_folder(pipeline: DiPPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    pipeline.save_pretrained("~/saved")
    again = DiPPipeline.from_pretrained("~/saved")
    pipeline.model.add_adapter(peft.LoraConfig(r=2, target_modules=["qkv"]))
    pipeline.save_lora_weights("~/lora")
    again.load_lora_weights("~/lora")
    assert again.model.adapters and [path.name for path in tmp_path.iterdir()] == ["home"]


def test_what_could_not_be_loaded_again_is_not_saved(pipeline: DiPPipeline, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="safe_serialization=False: only safetensors are loaded again"):
        pipeline.save_pretrained(tmp_path, safe_serialization=False)
    (tmp_path / "file").touch()
    for whole in (pipeline, pipeline.model):
        with pytest.raises(UserError, match="file: a file; name a folder to save to"):
            whole.save_pretrained(tmp_path / "file")
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "class_names": ["ant", "bee"]}))
    with pytest.raises(UserError, match="class_names: 2 names for 3 classes"):
        DiPPipeline.from_pretrained(tmp_path)


def test_a_folder_from_before_there_were_schedulers(model_folder: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(model_folder, old)
    shutil.rmtree(old / "scheduler")
    index = json.loads((old / "model_index.json").read_text())
    del index["scheduler"]
    (old / "model_index.json").write_text(json.dumps(index))
    assert isinstance(DiPPipeline.from_pretrained(old).scheduler, FlowMatchEulerDiscreteScheduler)


def test_lora(pipeline: DiPPipeline, model_folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = {"class_labels": ["ant"], "num_inference_steps": 3, "output_type": "latent"}
    plain = pipeline(**settings).images
    layers = ["qkv", "attention.out", "mlp.up", "down.0", "detailer.out"]
    pipeline.model.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=layers, init_lora_weights=False))
    adapted = pipeline(**settings).images
    assert (adapted - plain).abs().max() > 0.01
    pipeline.save_lora_weights(tmp_path)
    with pytest.raises(UserError, match="a model with adapters is not saved"):
        pipeline.save_pretrained(tmp_path / "whole")
    again = DiPPipeline.from_pretrained(model_folder)
    again.load_lora_weights(tmp_path, adapter_name="mine")
    assert torch.equal(again(**settings).images, adapted)
    again.set_adapters("mine", 0.0)
    assert torch.equal(again(**settings).images, plain)
    again.set_adapters("mine", 1.0)
    again.fuse_lora()
    torch.testing.assert_close(again(**settings).images, adapted, rtol=1e-4, atol=1e-4)
    fused = copy.deepcopy(again)
    fused.unload_lora_weights()
    fused.save_pretrained(tmp_path / "fused")
    saved = DiPPipeline.from_pretrained(tmp_path / "fused")
    saved.save_pretrained(tmp_path / "copy")
    for folder in (tmp_path / "fused", tmp_path / "copy"):
        assert (folder / "README.md").read_text().count("Adapters (LoRA) were fused into these weights: mine. ") == 1
    torch.testing.assert_close(saved(**settings).images, adapted, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"LoRA weights: mine would be fused no longer; call unload_lora_weights\(\)"):
        again.load_lora_weights(tmp_path, adapter_name="other")
    with pytest.raises(UserError, match="fuse_lora: no adapter 'typo'; there are mine"):
        again.fuse_lora(adapter_names=["typo"])
    again.unfuse_lora()
    again.unload_lora_weights()
    with pytest.raises(UserError, match="fuse_lora: no LoRA weights are loaded"):
        again.fuse_lora("model")
    torch.testing.assert_close(again(**settings).images, plain, rtol=1e-4, atol=1e-4)
    again.load_lora_weights(tmp_path, adapter_name="mine")
    again.load_lora_weights(tmp_path, adapter_name="mine", hotswap=True)  # the same adapters as before, and no mistake
    torch.testing.assert_close(again(**settings).images, adapted, rtol=1e-4, atol=1e-4)
    again.unload_lora_weights()
    weights = {"elsewhere.lora_A.weight": torch.zeros(4, 8), "elsewhere.lora_B.weight": torch.zeros(8, 4)}
    with pytest.raises(UserError, match=r"LoRA weights: .*elsewhere.* not found"):
        again.load_lora_weights(weights)
    with pytest.raises(UserError, match="LoRA weights nowhere: "):
        again.load_lora_weights("nowhere")
    layer = "backbone.blocks.0.attention.qkv"
    weights = {f"{layer}.lora_A.weight": torch.zeros(4, 64), f"{layer}.lora_B.weight": torch.zeros(192, 4)}
    with pytest.raises(UserError, match=r"LoRA weights: of a model of other sizes \(size mismatch for \S+lora_A.*\)$"):
        again.load_lora_weights(weights)
    again.save_pretrained(tmp_path / "after it failed")
    DiPPipeline.from_pretrained(tmp_path / "after it failed")
    for none in ({}, {"a": torch.zeros(3)}):
        with pytest.raises(UserError, match="LoRA weights: no tensors of LoRA are in it"):
            again.load_lora_weights(none)
    (tmp_path / "damaged.safetensors").write_bytes(b"abc")
    with pytest.raises(UserError, match=r"damaged\.safetensors: cannot be loaded \(Error while deserializing"):
        again.load_lora_weights(tmp_path / "damaged.safetensors")
    with pytest.raises(UserError, match="LoRA adapter to save: name one of those loaded; none is loaded"):
        again.save_lora_weights(tmp_path / "copied")
    again.load_lora_weights(tmp_path)
    again.save_lora_weights(tmp_path / "copied")  # the only one, whatever its name
    copied, written = (folder / "pytorch_lora_weights.safetensors" for folder in (tmp_path / "copied", tmp_path))
    assert load_file(copied).keys() == load_file(written).keys()
    again.load_lora_weights(tmp_path, adapter_name="second")
    with pytest.raises(UserError, match="name one of those loaded; there are default_0, second"):
        again.save_lora_weights(tmp_path / "copied")


def test_the_card_and_the_network_know_what_is_fused(pipeline: DiPPipeline, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["down.0", "merge.0"], init_lora_weights=False)  # of the head
    pipeline.model.add_adapter(config, "a")
    pipeline.save_lora_weights(tmp_path / "a")
    pipeline.unload_lora_weights()
    inputs = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.8]), torch.tensor([0, 1])

    @torch.no_grad()
    def output() -> torch.Tensor:
        return pipeline.model(*inputs)

    plain = output()
    pipeline.load_lora_weights(tmp_path / "a", adapter_name="a")
    adapted = output()
    assert (adapted - plain).abs().max() > 0.01
    pipeline.fuse_lora()
    pipeline.disable_lora()
    output()  # which takes it out of the weights again
    pipeline.unload_lora_weights()
    torch.testing.assert_close(output(), plain, rtol=1e-4, atol=1e-4)
    pipeline.save_pretrained(tmp_path / "without")
    assert "were fused" not in (tmp_path / "without" / "README.md").read_text()
    pipeline.load_lora_weights(tmp_path / "a", adapter_name="a")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(output(), adapted, rtol=1e-4, atol=1e-4)
    pipeline.load_lora_weights(tmp_path / "a", adapter_name="b")
    pipeline.fuse_lora()
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(output(), adapted, rtol=1e-4, atol=1e-4)
    pipeline.save_pretrained(tmp_path / "with")
    assert "were fused into these weights: a. " in (tmp_path / "with" / "README.md").read_text()


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_deleted_adapter_leaves_its_layers_as_they_were(
    is_fused: bool, pipeline: DiPPipeline, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["qkv", "down.0", "merge.0"], init_lora_weights=False)
    inputs = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.8]), torch.tensor([0, 1])
    with torch.no_grad():
        plain = pipeline.model(*inputs)
        pipeline.model.add_adapter(config, "a")
        adapted = pipeline.model(*inputs)
        pipeline.model.add_adapter(config, "b")
        if is_fused:
            pipeline.fuse_lora(adapter_names=["a"])
        pipeline.delete_adapters("a")
        if is_fused:
            pipeline.unfuse_lora()  # which cannot take out what is deleted
        pipeline.delete_adapters(["b"])
        expected = adapted if is_fused else plain
        assert (adapted - plain).abs().max() > 0.01
        torch.testing.assert_close(pipeline.model(*inputs), expected, rtol=1e-4, atol=1e-4)
        pipeline.save_pretrained(tmp_path)
        torch.testing.assert_close(DiPPipeline.from_pretrained(tmp_path).model(*inputs), expected, rtol=1e-4, atol=1e-4)
    assert ("were fused into these weights: a. " in (tmp_path / "README.md").read_text()) == is_fused
    pipeline.model.quantize_to_int8()
    assert pipeline.model.in_int8
