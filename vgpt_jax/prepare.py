"""Prepares a data set of tensorflow-datasets: ``python -m vgpt_jax.prepare --name stanford_dogs``.

`vgpt_jax.main` does the same by itself where it is not done. Without a network, ``--manual_dir`` names a folder with the archives
under their published names: for stanford_dogs images.tar, annotation.tar and lists.tar.
"""

from vgpt_jax.command_line import CommandParser
from vgpt_jax.data.tfds_prepare import prepare
from vgpt_jax.data.tfds_source import make_builder
from vgpt_jax.errors import exit_on_user_error


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = CommandParser("prepare", __doc__)
    parser.add_argument("--name", required=True, help="of the data set, such as stanford_dogs, cifar10 or imagenet2012")
    parser.add_argument(
        "--data_dir", default="", help="where it is put; $TFDS_DATA_DIR or ~/tensorflow_datasets otherwise"
    )
    parser.add_argument("--manual_dir", default="", help="folder of archives that were downloaded by hand")
    arguments = parser.parse_args(argv)

    directory = prepare(arguments.name, data_dir=arguments.data_dir, manual_dir=arguments.manual_dir)
    splits = make_builder(arguments.name, arguments.data_dir).info.splits
    counts = ", ".join(f"{name} {split.num_examples:,}" for name, split in splits.items())
    print(f"{arguments.name} is prepared in {directory}: {counts}")


if __name__ == "__main__":
    main()
