"""Networks that nobody wrote with se_fx in mind: of MONAI, Kornia, pytorchcv, pretrainedmodels, super-image, vit-pytorch,
Transformers and Diffusers, small and with random weights. `examples/zoo.py strangers` transforms them all.

Each is named package/network, and comes with what it is called with. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

Made = tuple[Callable[[], nn.Module], tuple[Any, ...]]  # how to build a network, and what to call it with


def image(size: int = 64, channels: int = 3, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, channels, size, size)


def made(home: str, name: str, *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    """A call of something by its name in a package, which is imported then."""
    return lambda: getattr(importlib.import_module(home), name)(*args, **kwargs)


def monai() -> Iterator[tuple[str, Callable[[], nn.Module], Any]]:
    net = functools.partial(made, "monai.networks.nets")
    two = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
    x = image(channels=1)
    narrow = (8, 8, 16, 16, 32, 8)
    steps = {"channels": (8, 16, 32), "strides": (2, 2)}
    yield "BasicUNet", net("BasicUNet", **two, features=narrow), x
    yield "BasicUNetPlusPlus", net("BasicUNetPlusPlus", **two, features=narrow), x
    yield "FlexibleUNet", net("FlexibleUNet", 1, 2, "efficientnet-b0", spatial_dims=2), x
    yield "FlexibleUNet, resnet18", net("FlexibleUNet", 1, 2, "resnet18", spatial_dims=2), x
    yield "UNet", net("UNet", **two, **steps, num_res_units=2), x
    yield "AttentionUnet", net("AttentionUnet", **two, **steps), x
    yield "DynUNet", net("DynUNet", **two, kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2]), x
    yield "SegResNet", net("SegResNet", spatial_dims=2, init_filters=8, in_channels=1, out_channels=2), x
    yield "SegResNetDS", net("SegResNetDS", spatial_dims=2, init_filters=8, in_channels=1, out_channels=2), x
    yield "SegResNetVAE", net("SegResNetVAE", input_image_size=(64, 64), spatial_dims=2, in_channels=1, out_channels=2), x
    yield "VNet", net("VNet", **two), x
    yield "UNETR", net("UNETR", 1, 2, (64, 64), spatial_dims=2, feature_size=8, hidden_size=48, mlp_dim=64, num_heads=4), x
    yield "SwinUNETR", net("SwinUNETR", **two, feature_size=12), x
    yield "HighResNet", net("HighResNet", **two), x
    yield "DenseNet121", net("DenseNet121", **two), x
    yield "SEResNet50", net("SEResNet50", spatial_dims=2, in_channels=1, num_classes=2), x
    yield "ResNet", net("resnet18", spatial_dims=2, n_input_channels=1, num_classes=2), x
    coder = {"channels": (8, 16), "strides": (2, 2)}
    yield "AutoEncoder", net("AutoEncoder", **two, **coder), x
    yield (
        "VarAutoEncoder",
        net("VarAutoEncoder", spatial_dims=2, in_shape=(1, 64, 64), out_channels=1, latent_size=4, **coder),
        x,
    )
    yield "AHNet", net("AHNet", spatial_dims=2, in_channels=1, out_channels=2, upsample_mode="bilinear"), image(128, 1)
    yield "MedNeXtS", net("MedNeXtS", **two), x
    yield "HoVerNet", net("HoVerNet", mode="fast", in_channels=3, out_classes=2), image(256, batch=1)
    yield (
        "Generator",
        net("Generator", latent_shape=(16,), start_shape=(8, 8, 8), channels=(16, 8), strides=(2, 1)),
        torch.rand(2, 16),
    )
    yield "Classifier", net("Classifier", in_shape=(1, 64, 64), classes=2, **steps), x
    yield "Discriminator", net("Discriminator", in_shape=(1, 64, 64), **steps), x
    yield "Regressor", net("Regressor", in_shape=(1, 64, 64), out_shape=(2,), **steps), x
    yield "RegUNet", net("RegUNet", **two, num_channel_initial=8, depth=2), x
    depths = {"unet_out_channels": 8, "channels": (8,) * 6, "final_conv_channels": (8,)}
    yield "VoxelMorphUNet", net("VoxelMorphUNet", spatial_dims=2, in_channels=2, **depths), image(channels=2)
    small = {"channels": (8, 16), "num_res_blocks": 1, "norm_num_groups": 4, "attention_levels": (False, True)}
    yield "DiffusionModelUNet", net("DiffusionModelUNet", **two, **small, num_head_channels=8), (x, torch.tensor([1, 2]))
    yield "AutoencoderKL", net("AutoencoderKL", **two, **small), x
    yield "PatchDiscriminator", net("PatchDiscriminator", spatial_dims=2, channels=8, in_channels=1), x


def kornia() -> Iterator[tuple[str, Callable[[], nn.Module], Any]]:
    feature, patch = functools.partial(made, "kornia.feature"), image(32, 1)
    for name in ("HardNet", "SOSNet", "HyNet", "TFeat", "OriNet"):
        yield name, feature(name, pretrained=False), patch
    yield "HardNet8", feature("HardNet8", pretrained=False), patch
    yield "DISK", feature("DISK"), image()
    yield "KeyNet", feature("KeyNet", pretrained=False), image(channels=1)
    yield "XFeatModel", feature("XFeatModel"), image()
    yield "DexiNed", made("kornia.models.dexined", "DexiNed", pretrained=False), image()
    yield "RRDBNet", made("kornia.models", "RRDBNet", 3, 3, num_feat=8, num_block=1, num_grow_ch=4), image(16)
    yield "TinyViT", made("kornia.contrib", "TinyViT", img_size=64, num_classes=4), image()
    yield "YuNet", made("kornia.models.yunet", "YuNet", "test", pretrained=False), image()


PYTORCHCV = """
airnet50_1x64d_r2 alexnet bagnet9 bam_resnet18 bn_vgg11 bninception cbam_resnet18 condensenet74_c4_g4 darknet53 densenet121
diaresnet20_cifar10 dla34 dpn68 efficientnet_b0 fbnet_cb fdmobilenet_wd4 ghostnet hardnet39ds hrnet_w18_small_v1 ibn_resnet50
igcv3_wd4 inceptionv4 menet108_8x1_g3 mixnet_s mnasnet_b1 mobilenet_wd4 mobilenetv2_wd4 mobilenetv3_large_w1 nasnet_4a1056
peleenet polynet preresnet18 proxylessnas_cpu regnetx002 regnety002 resattnet56 resnesta18 resnet18 resnext14_16x4d
scnet50 selecsls42b seresnet18 senet16 shufflenet_g1_wd4 shufflenetv2_wd2 sinet_cityscapes sknet50 sparsenet121 spnasnet
sqnxt23_w1 squeezenet_v1_0 squeezeresnet_v1_0 vovnet39 xception zfnet
fastscnn_cityscapes lednet_cityscapes bisenet_resnet18_celebamaskhq simplepose_resnet18_coco dicenet_wd5
""".split()  # noqa: SIM905


def pytorchcv() -> Iterator[tuple[str, Callable[[], nn.Module], Any]]:
    sizes = {"diaresnet20_cifar10": 32, "lednet_cityscapes": 128, "sinet_cityscapes": 128, "fastscnn_cityscapes": 128}
    sizes |= {"bisenet_resnet18_celebamaskhq": 128, "simplepose_resnet18_coco": 64}
    pairs = ("bam_resnet18", "ghostnet", "resnesta18", "scnet50", "sknet50")  # whose norms of vectors want two in train mode
    sizes |= {"inceptionv4": 299, "polynet": 331, "xception": 299}
    for name in PYTORCHCV:
        size = sizes.get(name, 224)
        options = {"in_size": (size, size)} if size in (64, 128) else {}
        yield (
            name,
            made("pytorchcv.model_provider", "get_model", name, **options),
            image(size, batch=2 if size < 200 or name in pairs else 1),
        )


def pretrainedmodels() -> Iterator[tuple[str, Callable[[], nn.Module], Any]]:
    sizes = {"inceptionv4": 299, "inceptionresnetv2": 299, "xception": 299}
    for name in (
        *("bninception", "dpn68", "inceptionresnetv2", "inceptionv4", "nasnetamobile"),
        *("se_resnet50", "se_resnext50_32x4d", "xception"),
    ):
        yield name, made("pretrainedmodels", name, pretrained=None), image(sizes.get(name, 224), batch=1)


def super_image() -> Iterator[tuple[str, Callable[[], nn.Module], Any]]:
    def network(name: str) -> nn.Module:
        home = importlib.import_module("super_image")
        config = getattr(home, f"{name}Config")
        small = {"n_resgroups": 2, "n_resblocks": 2, "n_feats": 32, "reduction": 4}
        known = inspect.signature(config.__init__).parameters
        return getattr(home, f"{name}Model")(config(scale=2, **{key: value for key, value in small.items() if key in known}))

    for name in ("A2n", "Awsrn", "Carn", "Ddbpn", "Drn", "Edsr", "Mdsr", "Msrn", "Pan", "Rcan", "Rnan"):
        yield name, functools.partial(network, name), image(16)


def vit_pytorch() -> Iterator[tuple[str, Callable[[], nn.Module], Any]]:
    x = image(64, batch=2)
    yield "CCT", made("vit_pytorch.cct", "CCT", img_size=64, embedding_dim=32, n_conv_layers=2, num_layers=2, num_heads=2), x
    yield "CvT", made("vit_pytorch.cvt", "CvT", num_classes=4, s3_depth=1), x
    yield (
        "LeViT",
        made(
            "vit_pytorch.levit", "LeViT", image_size=64, num_classes=4, dim=(32, 48, 64), depth=1, heads=(2, 3, 4), mlp_mult=2
        ),
        x,
    )
    yield "MaxViT", made("vit_pytorch.max_vit", "MaxViT", num_classes=4, dim=16, depth=(1, 1), window_size=4, dim_head=8), x
    yield (
        "MobileViT",
        made("vit_pytorch.mobile_vit", "MobileViT", (64, 64), [32, 48, 64], [16, 16, 24, 24, 32, 32, 48, 48, 56, 56, 64], 4),
        x,
    )
    yield (
        "NesT",
        made(
            "vit_pytorch.nest",
            "NesT",
            image_size=64,
            patch_size=4,
            dim=16,
            heads=2,
            num_hierarchies=2,
            block_repeats=1,
            num_classes=4,
        ),
        x,
    )
    yield (
        "RegionViT",
        made("vit_pytorch.regionvit", "RegionViT", dim=(8, 16, 32, 64), depth=(1, 1, 1, 1), num_classes=4),
        image(224, batch=1),
    )
    yield (
        "ScalableViT",
        made(
            "vit_pytorch.scalable_vit",
            "ScalableViT",
            num_classes=4,
            dim=8,
            heads=(1, 2),
            depth=(1, 1),
            ssa_dim_key=8,
            reduction_factor=(2, 1),
            window_size=(4, None),
        ),
        x,
    )
    yield (
        "TwinsSVT",
        made("vit_pytorch.twins_svt", "TwinsSVT", num_classes=4, s1_emb_dim=8, s2_emb_dim=8, s3_emb_dim=8, s4_emb_dim=8),
        image(224, batch=1),
    )
    yield (
        "XCiT",
        made(
            "vit_pytorch.xcit",
            "XCiT",
            image_size=64,
            patch_size=16,
            num_classes=4,
            dim=32,
            depth=1,
            cls_depth=1,
            heads=2,
            mlp_dim=32,
        ),
        x,
    )
    yield (
        "PiT",
        made("vit_pytorch.pit", "PiT", image_size=64, patch_size=16, dim=32, num_classes=4, depth=(1, 1), heads=2, mlp_dim=32),
        x,
    )


#: Transformers' models with the sizes that make them small.
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "ResNetForImageClassification": {"embedding_size": 8, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]},
    "RegNetForImageClassification": {
        "embedding_size": 8,
        "hidden_sizes": [16, 24, 32, 40],
        "depths": [1, 1, 1, 1],
        "groups_width": 8,
    },
    "ConvNextForImageClassification": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "ConvNextV2ForImageClassification": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "MobileNetV1ForImageClassification": {"depth_multiplier": 0.25},
    "MobileNetV2ForImageClassification": {"depth_multiplier": 0.25},
    "MobileNetV2ForSemanticSegmentation": {"depth_multiplier": 0.25},
    "MobileViTForImageClassification": {
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 8, 16, 24, 32, 40, 48],
        "num_attention_heads": 2,
    },
    "MobileViTV2ForImageClassification": {"width_multiplier": 0.25},
    "EfficientNetForImageClassification": {"width_coefficient": 0.25, "hidden_dim": 320},
    "SegformerForSemanticSegmentation": {
        "hidden_sizes": [8, 16, 24, 32],
        "decoder_hidden_size": 16,
        "num_attention_heads": [1, 2, 2, 4],
    },
    "Swin2SRForImageSuperResolution": {
        "embed_dim": 12,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 8,
        "image_size": 16,
    },
    "PvtForImageClassification": {"hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 2, 4], "image_size": 64},
    "PvtV2ForImageClassification": {"hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 2, 4], "image_size": 64},
    "PoolFormerForImageClassification": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "LevitForImageClassification": {
        "image_size": 64,
        "hidden_sizes": [16, 32, 48],
        "num_attention_heads": [1, 2, 3],
        "depths": [1, 1, 1],
    },
    "FocalNetForImageClassification": {"image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1]},
    "BitForImageClassification": {"hidden_sizes": [128, 128, 128, 128], "depths": [1, 1, 1, 1], "embedding_size": 32},
    "TextNetForImageClassification": {},
    "HGNetV2ForImageClassification": {},
    "SwiftFormerForImageClassification": {},
    "SuperPointForKeypointDetection": {},
    "DPTForDepthEstimation": {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [8, 16, 24, 32],
        "fusion_hidden_size": 8,
        "image_size": 64,
    },
    "GLPNForDepthEstimation": {"hidden_sizes": [8, 16, 24, 32], "decoder_hidden_size": 16, "num_attention_heads": [1, 2, 2, 4]},
    "Data2VecVisionForSemanticSegmentation": {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 64,
        "out_indices": [0, 1, 2, 3],
    },
    "DetrForObjectDetection": {
        "use_timm_backbone": True,
        "backbone": "resnet18",
        "use_pretrained_backbone": False,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
    },
    "RTDetrResNetBackbone": {"embedding_size": 8, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]},
    "UperNetForSemanticSegmentation": {"hidden_size": 16},
}


def transformers() -> Iterator[tuple[str, Callable[[], nn.Module], Any]]:
    def network(name: str, options: dict[str, Any]) -> nn.Module:
        model = getattr(importlib.import_module("transformers"), name)
        return model(model.config_class(**options))

    for name, options in TRANSFORMERS.items():
        x = image(16) if "Swin2SR" in name else image(224, batch=1) if name.startswith("SwiftFormer") else image()
        yield name, functools.partial(network, name, options), x


def diffusers() -> Iterator[tuple[str, Callable[[], nn.Module], Any]]:
    net = functools.partial(made, "diffusers")
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    coder = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    plain = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    crossed = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 8, "attention_head_dim": 4}
    x, step, words = image(32), torch.tensor(3), torch.rand(2, 5, 8)
    yield "AutoencoderKL", net("AutoencoderKL", **blocks, **coder), x
    yield (
        "AutoencoderTiny",
        net("AutoencoderTiny", encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8)),
        x,
    )
    yield "VQModel", net("VQModel", **blocks, **coder), x
    yield "UNet2DModel", net("UNet2DModel", **blocks, **plain, attention_head_dim=4, sample_size=32), (x, step)
    four = image(32, 4)
    up = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    yield "UNet2DConditionModel", net("UNet2DConditionModel", **blocks, **crossed, **up, sample_size=32), (four, step, words)
    yield (
        "ControlNetModel",
        net("ControlNetModel", **blocks, **crossed, conditioning_embedding_out_channels=(8, 8)),
        (four, step, words, image(64)),
    )
    yield "T2IAdapter", net("T2IAdapter", in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=8), image(64)


PACKAGES: dict[str, Callable[[], Iterator[tuple[str, Callable[[], nn.Module], Any]]]] = {
    each.__name__: each
    for each in (monai, kornia, pytorchcv, pretrainedmodels, super_image, vit_pytorch, transformers, diffusers)
}


@functools.cache
def networks() -> dict[str, Made]:
    found: dict[str, Made] = {}
    for package, listed in PACKAGES.items():
        for name, build, given in listed():
            found[f"{package}/{name}"] = (build, given if isinstance(given, tuple) else (given,))
    return found


def strangers_names() -> list[str]:
    return list(networks())


def strangers_attempts(name: str) -> Iterator[Made]:
    yield networks()[name]
