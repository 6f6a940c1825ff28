"""python check.py FOLDER, with an unpacked diffusers in front on the path: dW of the UNet's modules as it loads them."""
import json, pathlib, sys, warnings

warnings.simplefilter("ignore")
import diffusers, safetensors, safetensors.torch, torch

from lora_squeeze.formats import diffusers as ours

OLD = diffusers.__version__.startswith("0.33")  # takes no settings
BLOCKS = dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"))
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors")):
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8,
        norm_num_groups=4, **BLOCKS,
    )
    with safetensors.safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata")
    more = {} if OLD or not text else {"metadata": json.loads(text)}
    unet.load_lora_adapter(safetensors.torch.load_file(path), prefix="unet", adapter_name="x", **more)
    adapter, worst = ours.load(path), 0.0
    for name, module in unet.named_modules():
        if "x" in getattr(module, "lora_A", {}):
            update = adapter.update(f"unet.{name}")
            dW = update.scale * (update.B.double() @ update.A.double())
            found = module.get_delta_weight("x").detach().double().flatten(1)
            worst = max(worst, float((found - dW).norm() / dW.norm()))
    print(diffusers.__version__, path.stem, f"{worst:.1e}")
