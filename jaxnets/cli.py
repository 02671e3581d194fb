"""The command ``jaxnets``: what may be said to it, and how it answers what may not."""

import contextlib
import importlib
import io
import logging
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxnets import cpu

DataName = Literal["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "svhn_cropped"]
ModelName = Literal[
    "perceptron", "mlp", "rbf_network", "lenet5", "lenet5_modern", "small_cnn", "madry_cnn", "alexnet",
    "alexnet_one_column", "zfnet", "vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn",
    "googlenet", "googlenet_bn", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "cifar_resnet20",
    "cifar_resnet56", "cifar_resnet110", "preact_resnet18", "preact_resnet34", "preact_resnet50", "preact_resnet110",
    "preact_resnet164", "preact_resnet1001", "preact_resnet200", "wide_resnet28_10", "wide_resnet34_10",
    "wide_resnet70_16", "vit_small",
]  # fmt: skip
ObjectiveName = Literal[
    "adversarial", "standard", "fast", "n_fgsm", "grad_align", "free", "trades", "mart", "kurakin",
    "virtual_adversarial", "ensemble_adversarial", "auxiliary", "ibp", "crown_ibp",
]  # fmt: skip
ThreatName = Literal["linf", "l2", "l1"]
AttackName = Literal["pgd", "fgsm"]
SuiteName = Literal["pgd", "autoattack", "autoattack_plus", "autoattack_rand"]
CertificateName = Literal["intervals", "crown"]
StartName = Literal["uniform", "uniform_unclipped", "gaussian", "at_clean"]
OptimizerName = Literal["adamw", "sgd", "lion"]
ScheduleName = Literal["triangular", "cosine", "constant"]
AugmentName = Literal["crop", "flip", "cutout", "mixup", "cutmix"]
SweepName = Literal["learning_rate", "epsilon", "beta"]


@dataclass(frozen=True)
class Train:
    """Train a classifier, attack it, and say how robust it is.

    Started again, the same command continues a run that was stopped, from its last checkpoint. Several networks
    (--seeds, --sweep) are trained together, and each ends as a run: <out>/seed3 or <out>/beta6-seed3. In ibp and
    crown_ibp epsilon rises over the first half of training.
    """

    data: DataName = "digits"
    """Real images. digits comes with scikit-learn; the others are read, prepared or downloaded."""
    data_dir: Path | None = None
    """Where data is; unless given $JAXNETS_DATA, else the folder of tensorflow-datasets."""
    model: ModelName = "small_cnn"
    """The network."""
    objective: ObjectiveName = "adversarial"
    """What training lowers: the loss on attacked rows, on the rows as they are, or that of a method by its name."""
    threat: ThreatName = "linf"
    """The norm that bounds a perturbation."""
    epsilon: float = 0.2
    """The bound, in units of the data: pixels are in [0, 1]."""
    attack: AttackName = "pgd"
    """What adversarial, trades, mart, ensemble_adversarial train against: many small steps, or one of 1.25 epsilon."""
    sources: tuple[Path, ...] = ()
    """Runs whose networks ensemble_adversarial attacks too, beside its own."""
    steps: int | None = None
    """Steps of pgd in training, 10 unless given; in free replays of a batch, 8 unless given."""
    start: StartName | None = None
    """Where the attack of training starts; unless given near the clean point in trades and mart, else uniform."""
    beta: float | None = None
    """Weight of the second term of trades (6 unless given), mart (6), virtual_adversarial (1), grad_align (0.2)."""
    awp: float | None = None
    """Perturb the weights too, by this share of each layer's norm; 0.005 to 0.01 in the paper."""
    augment: tuple[AugmentName, ...] = ()
    """Changes to the training rows, in this order."""
    epochs: int | None = None
    """Passes over the training rows; unless given 100 for digits, else 10, in free divided by its replays."""
    batch_size: int = 64
    """Rows a step, over all devices."""
    optimizer: OptimizerName = "adamw"
    """From optax; sgd has Nesterov momentum 0.9."""
    learning_rate: float | None = None
    """The highest; unless given 0.01 for digits, else 0.001."""
    schedule: ScheduleName = "triangular"
    """The learning rate over the run: rises for two fifths and falls, falls by a cosine, or stays."""
    weight_decay: float = 0.0
    """Decoupled, times the learning rate."""
    label_smoothing: float = 0.0
    """Probability spread evenly over all classes."""
    ema: float | None = None
    """Average the weights with this decay, 0.999 for example; the average is what is attacked and reported."""
    held_out: int = 0
    """Training rows that are kept back; the network most robust on them is kept and reported beside the last."""
    patience: int | None = None
    """Looks at the held-out rows without a more robust network after which training ends; never unless given."""
    seed: int = 0
    """Of initial weights, order of rows and attacks."""
    seeds: int = 1
    """Networks, of this seed and those that follow, trained together; each ends as a run of its own."""
    sweep: SweepName | None = None
    """Train a network for each of --values, and each seed, together."""
    values: tuple[float, ...] = ()
    """Of what --sweep names."""
    evaluate_every: int = 10
    """Epochs between looks at the held-out rows, where there are none at test rows."""
    examples: int = 1000
    """Test rows, from the first on, that the evaluation attacks."""
    out: Path | None = None
    """The folder of the run; unless given runs/<data>-<model>-<objective>-<threat><epsilon>-seed<seed>."""


@dataclass(frozen=True)
class Evaluate:
    """Attack trained networks harder: one table and one picture for all."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs."""
    attack: SuiteName = "pgd"
    """pgd on three losses, or AutoAttack in one of its versions."""
    steps: int = 100
    """Steps of pgd."""
    restarts: int = 5
    """Random starts of pgd."""
    threat: ThreatName | None = None
    """The norm that bounds a perturbation; unless given that of each run's training."""
    epsilon: float | None = None
    """The bound; unless given that of each run's training."""
    examples: int = 1000
    """Test rows, from the first on, that are attacked."""
    data_dir: Path | None = None
    """Where data is; unless given that of each run's training."""
    seed: int = 0
    """Of the attacks."""
    eight_bit: bool = False
    """Round adversarial examples to multiples of 1/255, as image files hold them."""
    certify: CertificateName | None = None
    """Say too which rows no attack can break: by intervals, or by CROWN where it is tighter, which is slow."""
    last: bool = False
    """Attack the last weights of a run also where its best on held-out rows were kept."""
    save: bool = False
    """Write the adversarial examples of each run into its folder, for jaxnets verify."""
    out: Path | None = None
    """The folder for evaluation.json and evaluation.png; unless given the first run's."""


@dataclass(frozen=True)
class Verify:
    """Check saved adversarial examples, range, ball and accuracy, without any attack in the process."""

    file: Annotated[Path, tyro.conf.Positional]
    """What jaxnets evaluate --save wrote."""
    run: Path | None = None
    """The run whose network is asked; unless given the one named in the file."""
    data_dir: Path | None = None
    """Where data is; unless given that of the run's training."""


@dataclass(frozen=True)
class Summary:
    """Print the layers of a network, what they give, and what they cost; nothing is trained or computed."""

    model: Annotated[ModelName, tyro.conf.Positional]
    """The network."""
    image: tuple[int, int, int] | None = None
    """Height, width and channels of the images; unless given those that the network was published for."""
    classes: int | None = None
    """Number of logits; unless given that of the data that the network was published for."""
    depth: int = 1
    """1 for blocks, 2 for their parts, and so on."""


@dataclass(frozen=True)
class Export:
    """Write the trained network of a run as a folder that can be published: safetensors, and a config.

    jaxnets.weights.load reads it.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    folder: Annotated[Path, tyro.conf.Positional]
    """What is written: not there yet, or empty."""
    data_dir: Path | None = None
    """Where data is; unless given that of the run's training."""


Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Summary, tyro.conf.subcommand("summary")]
    | Annotated[Export, tyro.conf.subcommand("export")]
)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command. Impossible wishes get one line on standard error and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = _parse(arguments)
    try:
        _run(command)
    except KeyboardInterrupt:
        goes_on = "; the same command continues from the last checkpoint" if isinstance(command, Train) else ""
        print(f"\njaxnets: stopped{goes_on}", file=sys.stderr)
        sys.exit(130)


def _run(command: Train | Evaluate | Verify | Summary | Export) -> None:
    _show_messages()
    _keep_programs()
    cpu.tune()
    name = type(command).__name__.lower()
    # Here, because help need not wait for jax, nor verify know attacks.
    import jax

    from jaxnets.commands.run import EXPECTED

    try:
        jax.devices()
    except (AssertionError, RuntimeError):  # the first has no message
        platforms = os.environ.get("JAX_PLATFORMS")
        _refuse(f"JAX_PLATFORMS is {platforms}, which JAX cannot start here: take cpu, or unset it")
    try:
        getattr(importlib.import_module(f"jaxnets.commands.{name}"), name)(command)
    except EXPECTED as error:
        _refuse(" ".join(str(error).split()))


def _parse(arguments: list[str]) -> Train | Evaluate | Verify | Summary | Export:
    said = io.StringIO()
    os.environ.setdefault("COLUMNS", "100")
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(Command, prog="jaxnets", description=__doc__, args=arguments)  # pyright: ignore
    except SystemExit as exit_:
        if not exit_.code:
            raise
    _refuse(_one_line(said.getvalue()))
    raise AssertionError("unreachable")


def _show_messages() -> None:
    """The library's own messages (preparing data, a damaged checkpoint) go to standard error."""
    logging.basicConfig(format="jaxnets: %(message)s")
    logging.getLogger("jaxnets").setLevel(logging.INFO)


def _keep_programs() -> None:
    """What jax has compiled is there when the command is given again, unless its own settings say otherwise."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxnets"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def _one_line(box: str) -> str:
    """The message in the box that tyro draws, of ``+``, ``-`` and ``|`` where the terminal has nothing else."""
    lines = [re.sub(r"[│╭╮╰╯─]+|^[+|]|[+|]$|-{3,}", " ", line.strip()).strip() for line in box.splitlines()[1:]]
    message = " ".join(line for line in lines if line)
    return re.sub(r"\s*(For full helptext, (?:run|see))", r"; \1", message)


def _refuse(message: str) -> None:
    print(f"jaxnets: {message}", file=sys.stderr)
    sys.exit(2)
