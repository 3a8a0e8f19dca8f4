"""The library and the models work with only the core dependencies."""

import subprocess
import sys

CORE_ONLY = """
import importlib, pkgutil, sys

EXTRAS = {"lightning", "torchmetrics", "tensorboard", "sklearn", "scipy", "datasets", "pandas", "pyarrow", "matplotlib",
          "psutil", "tifffile", "imagecodecs", "zarr", "openslide", "pytest", "hypothesis",
          "transformers", "accelerate", "h5py", "rasterio", "onnx", "onnxruntime", "constriction", "timm", "torchmil"}
# Modules whose classes are subclasses of an extra's.
OF_EXTRAS = ("fitformer.training.", "fitformer.interop.transformers", "fitformer.interop.byte_tokenizer",
             "fitformer.interop.timm")

# As if they were not installed: importing one fails, and looking for one finds nothing.
sys.modules.update(dict.fromkeys(EXTRAS))
import torch
import fitformer

for module in pkgutil.walk_packages(fitformer.__path__, "fitformer."):
    core = not module.name.startswith(OF_EXTRAS) or module.name.endswith("run_dir")
    if core and not module.name.endswith("__main__"):
        importlib.import_module(module.name)

encoder = fitformer.FITImageEncoder.from_preset(
    "tiny", image_size=16, group_size=8, patch_size=4, channels=1, num_classes=3)
encoder.save_pretrained(sys.argv[1])
again = fitformer.FITImageEncoder.from_pretrained(sys.argv[1])
images = torch.rand(2, 16, 16, 1)
assert torch.equal(encoder.eval()(images), again(images))

from fitformer.cli import main
assert main(["info", "tiny"]) == 0
assert main(["train", "digits-classify"]) == 2
"""


def test_without_extras(tmp_path):
    done = subprocess.run([sys.executable, "-c", CORE_ONLY, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "fitformer: error: this needs the package 'lightning': pip install 'fitformer[train]'\n"
    assert "FITImageEncoder" in done.stdout
