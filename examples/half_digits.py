"""Pictures with a hole, for in-painting: ten digits of MNIST's test set, and a mask of which the upper half is known.

python examples/half_digits.py digits
zoo predict -c bfn/mnist --ckpt_path bfn-mnist --data.predict_images digits --data.predict_masks digits/mask/upper_half.png
"""

import sys
from pathlib import Path

from PIL import Image
from torchvision.transforms.functional import to_pil_image

from datamodules import MNIST

folder = Path(sys.argv[1])
(folder / "mask").mkdir(parents=True, exist_ok=True)
mask = Image.new("L", (28, 28), 0)
mask.paste(255, (0, 0, 28, 14))  # white is known
mask.save(folder / "mask" / "upper_half.png")

data = MNIST()
data.prepare_data()
data.setup("test")
seen: set[int] = set()
for image, label in data.test_dataloader().dataset:
    if int(label) not in seen:
        seen.add(int(label))
        to_pil_image(image).save(folder / f"{int(label)}.png")
