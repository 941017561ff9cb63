"""Sample digits from the weights that come with the package, and save them as a picture: ``python examples/sample.py``."""

import torch
from torchvision.utils import save_image

import zoo

model = zoo.load("bfn-digits")
with torch.inference_mode():
    samples = model.sample(torch.arange(64), seed=0, sampler="ode2m", nfe=10)
save_image(samples.images, "samples.png", nrow=8)
print(f"samples.png: {len(samples.images)} images, {samples.nfe} network calls each")
