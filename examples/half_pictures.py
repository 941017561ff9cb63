"""Pictures with a hole, for in-painting: one of each class of MNIST or FashionMNIST, and a mask whose upper half is known.

python examples/half_pictures.py digits
zoo predict -c bfn/mnist --ckpt_path bfn-mnist --data.predict_images digits --data.predict_masks digits/mask/upper_half.png

python examples/half_pictures.py clothes FashionMNIST
zoo predict -c emigm/fashion_mnist --ckpt_path emigm-fashion --data.predict_images clothes \
  --data.predict_masks clothes/mask/upper_half.png --data.predict_labels "[0,1,2,3,4,5,6,7,8,9]"
"""

import sys
from pathlib import Path

from PIL import Image
from torchvision.transforms.functional import to_pil_image

import datamodules

folder = Path(sys.argv[1])
(folder / "mask").mkdir(parents=True, exist_ok=True)
mask = Image.new("L", (28, 28), 0)
mask.paste(255, (0, 0, 28, 14))  # white is known
mask.save(folder / "mask" / "upper_half.png")

data = getattr(datamodules, sys.argv[2] if len(sys.argv) > 2 else "MNIST")()
data.prepare_data()
data.setup("test")
seen: set[int] = set()
for image, label in data.test_dataloader().dataset:
    if int(label) not in seen:
        seen.add(int(label))
        to_pil_image(image).save(folder / f"{int(label)}.png")
