"""Models that people really train, as small as their configurations allow, with random weights: what `zoo` morphs."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any] | tuple[Any, ...]


@dataclass(frozen=True)
class Architecture:
    """A model to be built.

    Attributes:
        library: ``torchvision``, ``timm`` or ``transformers``.
        name: Its name there.
        build: Makes the model, in training mode, and inputs for it.
    """

    library: str
    name: str
    build: Callable[[], tuple[nn.Module, Inputs]]


def architectures(libraries: tuple[str, ...] = ("torchvision", "timm", "transformers")) -> Iterator[Architecture]:
    """All models of these libraries, in a fixed order."""
    _check_installed()
    _let_torchvision_be_imported()
    tables: dict[str, Callable[[], Iterator[Architecture]]] = {
        "torchvision": _torchvision,
        "timm": _timm,
        "transformers": _transformers,
    }
    for library in libraries:
        yield from tables[library]()


def _check_installed() -> None:
    """Raise RuntimeError with what to do where a library is missing."""
    missing = [name for name in ("torchvision", "timm", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"{', '.join(missing)} not installed: pip install -c constraints.txt '.[zoo]'")


def _let_torchvision_be_imported() -> None:
    """Declare what torchvision expects of its C++ operators.

    The wheels on the package index are built for CUDA. Beside a CPU build of PyTorch their library does not load, which
    torchvision takes in its stride but for two operators whose fakes it registers in any case.
    """
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)
        with contextlib.suppress(ImportError):
            import torchvision  # noqa: F401


_kept: list[Any] = []


def image(size: int = 64, batch: int = 2) -> Tensor:
    """Random images [N, 3, size, size]."""
    return torch.randn(batch, 3, size, size)


def video(size: int = 32, frames: int = 8) -> Tensor:
    """Random clips [N, 3, T, size, size]."""
    return torch.randn(2, 3, frames, size, size)


def _torchvision() -> Iterator[Architecture]:
    from torchvision import models
    from torchvision.models.convnext import CNBlockConfig
    from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
    from torchvision.models.video.mvit import MSBlockConfig

    def named(name: str, size: int = 64, **options: Any) -> Callable[[], tuple[nn.Module, Inputs]]:
        return lambda: (models.get_model(name, weights=None, **options), (image(size),))

    def made(make: Callable[[], nn.Module], inputs: Callable[[], Tensor] = image) -> Callable[[], Any]:
        return lambda: (make(), (inputs(),))

    def vgg(batch_norm: bool) -> nn.Module:
        net = models.VGG(models.vgg.make_layers([8, "M", 16, "M", 32, 32, "M", 512, "M"], batch_norm), num_classes=10)
        net.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(512 * 49, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10)
        )
        return net

    def mvit() -> nn.Module:
        setting = [
            MSBlockConfig(1, 16, 32, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 4, 4]),
            MSBlockConfig(2, 32, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 2, 2]),
            MSBlockConfig(2, 32, 32, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
        ]
        return models.video.MViT((32, 32), 8, setting, residual_pool=False, residual_with_cls_embed=True,
                                 rel_pos_embed=False, proj_after_attn=False, num_classes=10)  # fmt: skip

    swin = {"patch_size": [4, 4], "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    table: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
        "vgg": made(lambda: vgg(False)),
        "vgg_bn": made(lambda: vgg(True)),
        "resnet18": named("resnet18", 32),
        "resnet50": named("resnet50", 32),
        "resnext50_32x4d": named("resnext50_32x4d", 32),
        "wide_resnet50_2": named("wide_resnet50_2", 32),
        "squeezenet1_0": named("squeezenet1_0"),
        "squeezenet1_1": named("squeezenet1_1"),
        "densenet": made(lambda: models.DenseNet(8, (2, 2, 2), 16)),
        "densenet121": named("densenet121"),
        "inception_v3": named("inception_v3", 299, init_weights=False),
        "googlenet": named("googlenet", 64, init_weights=False),
        "shufflenet_v2_x0_5": named("shufflenet_v2_x0_5", 32),
        "mobilenet_v2": named("mobilenet_v2", 32),
        "mobilenet_v3_small": named("mobilenet_v3_small", 32),
        "mobilenet_v3_large": named("mobilenet_v3_large", 32),
        "mnasnet0_5": named("mnasnet0_5", 32),
        "efficientnet_b0": named("efficientnet_b0", 32),
        "efficientnet_v2": made(
            lambda: models.EfficientNet(
                [FusedMBConvConfig(1, 3, 1, 16, 16, 2), MBConvConfig(4, 3, 2, 16, 32, 3)], 0.1, last_channel=64
            )
        ),
        "regnet_x_400mf": named("regnet_x_400mf", 32),
        "regnet_y_400mf": named("regnet_y_400mf", 32),
        "convnext": made(lambda: models.ConvNeXt([CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)], 0.1)),
        "swin": made(lambda: models.SwinTransformer(**swin)),
        "swin_v2": made(
            lambda: models.SwinTransformer(
                **swin,
                block=models.swin_transformer.SwinTransformerBlockV2,
                downsample_layer=models.swin_transformer.PatchMergingV2,
            )
        ),
        "vit": made(lambda: models.VisionTransformer(32, 8, 3, 4, 32, 64, 0.1), lambda: image(32)),
        "maxvit": made(
            lambda: models.MaxVit((64, 64), 16, 4, [16, 32], [1, 2], 8, num_classes=10, stochastic_depth_prob=0.1)
        ),
        "fcn_resnet50": named("fcn_resnet50", weights_backbone=None, num_classes=3),
        "deeplabv3_mobilenet_v3_large": named("deeplabv3_mobilenet_v3_large", weights_backbone=None, num_classes=3),
        "lraspp_mobilenet_v3_large": named("lraspp_mobilenet_v3_large", weights_backbone=None, num_classes=3),
        "r3d_18": made(models.video.r3d_18, video),
        "mc3_18": made(models.video.mc3_18, video),
        "r2plus1d_18": made(models.video.r2plus1d_18, video),
        "s3d": made(models.video.s3d, lambda: video(224, 16)),
        "mvit": made(mvit, video),
    }
    for name, build in table.items():
        yield Architecture("torchvision", name, build)


_TIMM: dict[str, dict[str, Any]] = {
    "resnet10t": {},
    "resnet26d": {},
    "seresnext26d_32x4d": {},
    "skresnet18": {},
    "res2net50_14w_8s": {},
    "resnest14d": {},
    "ecaresnet26t": {},
    "nf_regnet_b0": {},
    "nf_resnet26": {},
    "regnetx_002": {},
    "regnety_002": {},
    "convnext_atto": {},
    "convnextv2_atto": {},
    "inception_next_atto": {},
    "efficientnet_lite0": {},
    "tf_efficientnetv2_b0": {},
    "mixnet_s": {},
    "mobilenetv3_small_050": {},
    "mobilenetv4_conv_small": {},
    "lcnet_050": {},
    "tinynet_e": {},
    "ghostnet_050": {},
    "hardcorenas_a": {},
    "rexnet_100": {},
    "mobileone_s0": {},
    "repvgg_a0": {},
    "hrnet_w18_small": {},
    "dla46_c": {},
    "ese_vovnet19b_dw": {},
    "cspdarknet53": {},
    "selecsls42": {},
    "densenet121": {},
    "starnet_s1": {},
    "hgnetv2_b0": {},
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 3},
    "vit_base_patch16_rope_reg1_gap_256": {"img_size": 64, "depth": 3, "embed_dim": 64, "num_heads": 4},
    "eva02_tiny_patch14_224": {"img_size": 56, "depth": 3},
    "deit_tiny_distilled_patch16_224": {"img_size": 64, "depth": 3},
    "beit_base_patch16_224": {"img_size": 64, "depth": 3, "embed_dim": 64, "num_heads": 4},
    "cait_xxs24_224": {"img_size": 64, "depth": 3},
    "xcit_nano_12_p16_224": {"img_size": 64, "depth": 3},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2, 2, 2)},
    "swinv2_tiny_window8_256": {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2, 2, 2)},
    "mixer_s32_224": {"img_size": 64},
    "gmlp_ti16_224": {"img_size": 64},
    "resmlp_12_224": {"img_size": 64},
    "poolformer_s12": {},
    "pvt_v2_b0": {},
    "edgenext_xx_small": {},
    "mobilevit_xxs": {},
    "mobilevitv2_050": {},
    "levit_128s": {"img_size": 64},
    "efficientformer_l1": {"img_size": 224},
    "efficientvit_b0": {},
    "fastvit_t8": {},
    "coat_lite_tiny": {"img_size": 64},
    "twins_svt_small": {"img_size": 64},
    "visformer_tiny": {"img_size": 64},
    "focalnet_tiny_srf": {},
    "maxvit_rmlp_pico_rw_256": {"img_size": 64},
    "repghostnet_050": {},
    "sequencer2d_s": {"img_size": 64},
}


def _timm() -> Iterator[Architecture]:
    import timm

    def build(name: str, options: dict[str, Any]) -> tuple[nn.Module, Inputs]:
        net = timm.create_model(name, pretrained=False, num_classes=10, **options)
        return net, (image(options.get("img_size", 64)),)

    for name, options in _TIMM.items():
        yield Architecture("timm", name, lambda name=name, options=options: build(name, options))  # type: ignore[misc]


_WIDTHS = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER_DECODER = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_VISION = _WIDTHS | {"image_size": 32, "patch_size": 8}
_AUDIO = _WIDTHS | {
    "conv_dim": (16, 16),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 8),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
    "apply_spec_augment": False,
    "feat_extract_norm": "layer",
}
_TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertModel": ("text", _WIDTHS),
    "BertForSequenceClassification": ("text", _WIDTHS),
    "RobertaModel": ("text", _WIDTHS | {"max_position_embeddings": 80}),
    "AlbertModel": ("text", _WIDTHS | {"embedding_size": 16}),
    "DistilBertModel": ("text", {"vocab_size": 99, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48}),
    "ElectraModel": ("text", _WIDTHS | {"embedding_size": 16}),
    "DebertaV2Model": ("text", _WIDTHS | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "MPNetModel": ("text", _WIDTHS | {"max_position_embeddings": 80}),
    "GPT2LMHeadModel": ("text", {"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "GPTNeoModel": (
        "text",
        _WIDTHS
        | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "num_hidden_layers": 2},
    ),
    "GPTNeoXModel": ("text", _WIDTHS),
    "GPTJModel": (
        "text",
        {"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    ),
    "OPTModel": ("text", _WIDTHS | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "BloomModel": ("text", {"vocab_size": 99, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "LlamaForCausalLM": ("text", _WIDTHS),
    "MistralModel": ("text", _WIDTHS),
    "MixtralModel": ("text", _WIDTHS | {"num_local_experts": 4}),
    "Qwen2Model": ("text", _WIDTHS),
    "Qwen3Model": ("text", _WIDTHS | {"head_dim": 8}),
    "GemmaModel": ("text", _WIDTHS | {"head_dim": 8}),
    "Gemma2Model": ("text", _WIDTHS | {"head_dim": 8}),
    "PhiModel": ("text", _WIDTHS | {"num_key_value_heads": 4}),
    "FalconModel": ("text", _WIDTHS),
    "OlmoModel": ("text", _WIDTHS),
    "Starcoder2Model": ("text", _WIDTHS),
    "StableLmModel": ("text", _WIDTHS),
    "MambaModel": ("text", {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "T5ForConditionalGeneration": (
        "text to text",
        {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
    "BartModel": ("text to text", _ENCODER_DECODER),
    "MBartModel": ("text to text", _ENCODER_DECODER),
    "PegasusModel": ("text to text", _ENCODER_DECODER),
    "MarianModel": ("text to text", _ENCODER_DECODER),
    "WhisperModel": ("speech to text", _ENCODER_DECODER | {"num_mel_bins": 16, "max_source_positions": 20}),
    "Wav2Vec2Model": ("audio", _AUDIO),
    "HubertModel": ("audio", _AUDIO),
    "WavLMModel": ("audio", _AUDIO),
    "ViTModel": ("image", _VISION),
    "DeiTModel": ("image", _VISION),
    "BeitModel": ("image", _VISION),
    "Dinov2Model": ("image", _VISION),
    "SwinModel": (
        "image",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "ConvNextModel": ("image", {"hidden_sizes": [16, 32], "depths": [1, 2], "num_stages": 2}),
    "ResNetModel": ("image", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2]}),
    "SegformerModel": ("image", {"hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 2, 4]}),
    "CLIPModel": ("image and text", {"text_config": _WIDTHS, "vision_config": _VISION, "projection_dim": 16}),
    "SiglipModel": ("image and text", {"text_config": _WIDTHS, "vision_config": _VISION}),
}


def _transformers() -> Iterator[Architecture]:
    import transformers

    transformers.logging.set_verbosity_error()

    def tokens() -> Tensor:
        return torch.randint(3, 90, (2, 12))

    def build(name: str, kind: str, options: dict[str, Any]) -> tuple[nn.Module, Inputs]:
        model_class = getattr(transformers, name)
        net = model_class(model_class.config_class(**options))
        inputs: dict[str, Callable[[], dict[str, Any]]] = {
            "text": lambda: {"input_ids": tokens()},
            "text to text": lambda: {"input_ids": tokens(), "decoder_input_ids": tokens()},
            "speech to text": lambda: {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": tokens()},
            "audio": lambda: {"input_values": torch.randn(2, 640)},
            "image": lambda: {"pixel_values": image(32)},
            "image and text": lambda: {"pixel_values": image(32), "input_ids": tokens()},
        }
        return net, inputs[kind]()

    for name, (kind, options) in _TRANSFORMERS.items():
        yield Architecture("transformers", name, lambda n=name, k=kind, o=options: build(n, k, o))  # type: ignore[misc]
