"""The names of ImageNet's classes (ILSVRC 2012), and which of them are dogs.

``imagenet_classes.txt`` beside this file has a line for each class, in order: its WordNet id and the first of WordNet's names
for it. The order is that of the ids, in which every published ImageNet classifier and generator counts its classes. It
agrees with the label file of TensorFlow Datasets and the synset table of timm, and the names with the categories of
torchvision.
"""

import functools
from pathlib import Path

CLASSES = Path(__file__).with_name("imagenet_classes.txt")

STANFORD_DOGS = (*range(151, 251), *range(252, 269), 273, 274, 275)
"""ImageNet's class ids of the 120 breeds of Stanford Dogs, in the order of both: a breed's position here is its class there.
Of the other dogs, 251 is a dalmatian and 269 to 272 are wolves and a coyote."""


@functools.cache
def imagenet_class_names() -> tuple[str, ...]:
    """The 1000 class names: WordNet id, "-", and a name in lower case with "_" for spaces ("n02085936-maltese_dog").

    For the dogs these are the names that TensorFlow Datasets gives to the classes of Stanford Dogs. They differ from each
    other by their ids; without, "crane" (bird, machine), "cardigan" (dog, jacket) and "maillot" come twice.
    """
    return tuple(line.replace(" ", "-") for line in CLASSES.read_text(encoding="utf-8").splitlines())
