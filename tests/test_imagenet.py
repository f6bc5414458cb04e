"""The names of ImageNet's classes, against the label file of TensorFlow Datasets and the folders of Stanford Dogs."""

import re
from pathlib import Path

import tensorflow_datasets

from vgpt_jax.imagenet import STANFORD_DOGS, imagenet_class_names
from vgpt_jax.sampling.class_names import find_class

# The folders of the data set's archive, in lower case and without the "n" in front, from public lists of them.
BREEDS = """
02085620-chihuahua 02085782-japanese_spaniel 02085936-maltese_dog 02086079-pekinese 02086240-shih-tzu
02086646-blenheim_spaniel 02086910-papillon 02087046-toy_terrier 02087394-rhodesian_ridgeback 02088094-afghan_hound
02088238-basset 02088364-beagle 02088466-bloodhound 02088632-bluetick 02089078-black-and-tan_coonhound
02089867-walker_hound 02089973-english_foxhound 02090379-redbone 02090622-borzoi 02090721-irish_wolfhound
02091032-italian_greyhound 02091134-whippet 02091244-ibizan_hound 02091467-norwegian_elkhound 02091635-otterhound
02091831-saluki 02092002-scottish_deerhound 02092339-weimaraner 02093256-staffordshire_bullterrier
02093428-american_staffordshire_terrier 02093647-bedlington_terrier 02093754-border_terrier
02093859-kerry_blue_terrier 02093991-irish_terrier 02094114-norfolk_terrier 02094258-norwich_terrier
02094433-yorkshire_terrier 02095314-wire-haired_fox_terrier 02095570-lakeland_terrier 02095889-sealyham_terrier
02096051-airedale 02096177-cairn 02096294-australian_terrier 02096437-dandie_dinmont 02096585-boston_bull
02097047-miniature_schnauzer 02097130-giant_schnauzer 02097209-standard_schnauzer 02097298-scotch_terrier
02097474-tibetan_terrier 02097658-silky_terrier 02098105-soft-coated_wheaten_terrier
02098286-west_highland_white_terrier 02098413-lhasa 02099267-flat-coated_retriever 02099429-curly-coated_retriever
02099601-golden_retriever 02099712-labrador_retriever 02099849-chesapeake_bay_retriever
02100236-german_short-haired_pointer 02100583-vizsla 02100735-english_setter 02100877-irish_setter
02101006-gordon_setter 02101388-brittany_spaniel 02101556-clumber 02102040-english_springer
02102177-welsh_springer_spaniel 02102318-cocker_spaniel 02102480-sussex_spaniel 02102973-irish_water_spaniel
02104029-kuvasz 02104365-schipperke 02105056-groenendael 02105162-malinois 02105251-briard 02105412-kelpie
02105505-komondor 02105641-old_english_sheepdog 02105855-shetland_sheepdog 02106030-collie 02106166-border_collie
02106382-bouvier_des_flandres 02106550-rottweiler 02106662-german_shepherd 02107142-doberman
02107312-miniature_pinscher 02107574-greater_swiss_mountain_dog 02107683-bernese_mountain_dog 02107908-appenzeller
02108000-entlebucher 02108089-boxer 02108422-bull_mastiff 02108551-tibetan_mastiff 02108915-french_bulldog
02109047-great_dane 02109525-saint_bernard 02109961-eskimo_dog 02110063-malamute 02110185-siberian_husky
02110627-affenpinscher 02110806-basenji 02110958-pug 02111129-leonberg 02111277-newfoundland 02111500-great_pyrenees
02111889-samoyed 02112018-pomeranian 02112137-chow 02112350-keeshond 02112706-brabancon_griffon 02113023-pembroke
02113186-cardigan 02113624-toy_poodle 02113712-miniature_poodle 02113799-standard_poodle 02113978-mexican_hairless
02115641-dingo 02115913-dhole 02116738-african_hunting_dog
"""


def test_the_ids_are_those_of_tensorflow_datasets_in_its_order():
    labels = Path(tensorflow_datasets.__file__).parent / "datasets" / "imagenet2012" / "labels.txt"
    names = imagenet_class_names()
    assert [name.split("-")[0] for name in names] == labels.read_text().split()
    assert len(set(names)) == len(names) == 1000
    assert list(names) == sorted(names)
    assert all(re.fullmatch(r"n\d{8}-[a-z0-9_'-]+", name) for name in names)


def test_some_names_at_their_published_places():
    names = imagenet_class_names()
    published = {
        0: "tench",
        1: "goldfish",
        207: "golden_retriever",
        251: "dalmatian",
        269: "timber_wolf",
        282: "tiger_cat",
    }
    published |= {388: "giant_panda", 417: "balloon", 933: "cheeseburger", 967: "espresso", 999: "toilet_tissue"}
    assert {i: names[i].split("-", 1)[1] for i in published} == published


def test_the_dogs_are_the_folders_of_stanford_dogs_in_order():
    breeds = BREEDS.split()
    assert len(breeds) == 120
    assert [imagenet_class_names()[i] for i in STANFORD_DOGS] == [f"n{breed}" for breed in breeds]


def test_classes_are_found_by_their_bare_names():
    dogs = [imagenet_class_names()[i] for i in STANFORD_DOGS]
    assert [find_class(name, dogs) for name in ("maltese", "samoyed", "Australian Terrier")] == [2, 106, 42]
