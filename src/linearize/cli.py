"""The command line: one typed function a command. Flag = argument name = recipe key."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="linearize",
    help="Turn pretrained transformer language models into gated linear recurrent ones.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Out = Annotated[Path, typer.Option(help="Folder for the result: new, empty, or written by linearize.")]
Checkpoint = Annotated[Path, typer.Argument(help="Folder of a checkpoint that linearize wrote.")]
Set = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Set a recipe key, as in distill.tokens=2M.")
]
RecipeName = Annotated[str, typer.Argument(help="A .yaml file or a shipped recipe.")]
Baselines = Annotated[
    list[str], typer.Option(metavar="NAME", help="Also train this baseline: window-only or equal-memory.")
]
NoBaseline = Annotated[bool, typer.Option("--no-baseline", help="Train no baseline.")]
Model = Annotated[str | None, typer.Option(help="An embedded model's name, a folder, or a hub name owner/name.")]
Data = Annotated[str | None, typer.Option(help="Training text: wiki, a file, a folder, or a hub data set.")]
Structure = Annotated[str | None, typer.Option(help="The recurrence; none leaves the window alone.")]
Window = Annotated[int | None, typer.Option(help="Tokens that softmax attention sees.")]
Layers = Annotated[str | None, typer.Option(help="Layers to convert: all, or numbers and ranges like 0-7,16.")]
SoftmaxEvery = Annotated[int | None, typer.Option(help="Leave every N-th layer as softmax attention.")]


@app.command()
def run(
    out: Out,
    recipe: RecipeName = "default",
    model: Model = None,
    data: Data = None,
    structure: Structure = None,
    window: Window = None,
    layers: Layers = None,
    softmax_every: SoftmaxEvery = None,
    baseline: Baselines = [],  # noqa: B006 - typer's way of a repeated option
    no_baseline: NoBaseline = False,
    set_: Set = [],  # noqa: B006
) -> None:
    """The main job by a recipe: convert, align, distill, evaluate, report."""
    from linearize import report as reports
    from linearize.run import run as run_recipe

    given = {
        "model": model,
        "data.train": data,
        "mixer.structure": structure,
        "mixer.window": window,
        "layers": layers,
        "softmax_every": softmax_every,
    }
    report = run_recipe(_recipe(recipe, given, set_, baseline, no_baseline), out)
    print(reports.table(report))
    print(f"\n{reports.verdict(report)}\n\n{out / 'report.html'}")


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="An embedded model's name, a folder, or a hub name owner/name.")],
    out: Out,
    structure: Structure = None,
    window: Window = None,
    layers: Layers = None,
    softmax_every: SoftmaxEvery = None,
    set_: Set = [],  # noqa: B006
) -> None:
    """Swap softmax attention for Liger Attention, without training."""
    from linearize.run import convert_only

    given = {
        "model": model,
        "mixer.structure": structure,
        "mixer.window": window,
        "layers": layers,
        "softmax_every": softmax_every,
    }
    convert_only(_recipe("default", given, set_), out)
    print(out)


@app.command()
def align(checkpoint: Checkpoint, out: Out, recipe: RecipeName = "default", set_: Set = []) -> None:  # noqa: B006
    """Align each converted layer's output with the teacher's; LoRA stays beside the weights for distill."""
    from linearize.run import stage_only

    stage_only("align", checkpoint, _recipe(recipe, {}, set_), out)
    print(out)


@app.command()
def distill(checkpoint: Checkpoint, out: Out, recipe: RecipeName = "default", set_: Set = []) -> None:  # noqa: B006
    """Distill the teacher's next-token distribution into a converted or aligned checkpoint."""
    from linearize.run import stage_only

    stage_only("distill", checkpoint, _recipe(recipe, {}, set_), out)
    print(out)


@app.command("eval")
def evaluate(
    checkpoint: Checkpoint,
    baseline: Baselines = [],  # noqa: B006
    no_baseline: NoBaseline = False,
    set_: Set = [],  # noqa: B006
) -> None:
    """Evaluate a checkpoint against its teacher and its matched baselines; write its report."""
    from linearize import report as reports
    from linearize.run import evaluate_only

    report = evaluate_only(checkpoint, _recipe(str(checkpoint / "recipe.yaml"), {}, set_, baseline, no_baseline))
    print(reports.table(report))
    print(f"\n{reports.verdict(report)}\n\n{checkpoint / 'report.html'}")


@app.command()
def report(checkpoint: Checkpoint) -> None:
    """Draw report.html again from report.json."""
    from linearize import report as reports
    from linearize.results import read

    reports.write(read(checkpoint / "report.json"), checkpoint)
    print(checkpoint / "report.html")


@app.command()
def merge(checkpoint: Checkpoint, out: Out) -> None:
    """Merge a checkpoint's LoRA adapter into its weights."""
    from linearize.run import merge_only

    merge_only(checkpoint, out)
    print(out)


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="Give the prompt as a user's turn of the chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: int = 0,
) -> None:
    """Generate text, word by word, in constant memory."""
    from linearize.generate import generate as stream

    stream(checkpoint, prompt, chat, max_new_tokens, temperature, seed)


@app.command("inspect")
def inspect_(
    model: Annotated[str, typer.Argument(help="A checkpoint, an embedded model's name, a folder, or a hub name.")],
    context: Annotated[list[int], typer.Option(help="Context lengths to price.")] = [1024, 16384, 131072],  # noqa: B006
) -> None:
    """Layers, parameters, and what the cache weighs against the original's."""
    from linearize.inspect import show

    show(model, context)


def _recipe(
    source: str, given: dict[str, Any], set_: list[str], baseline: list[str] | None = None, no_baseline: bool = False
) -> Any:
    from linearize import recipe as recipes

    overrides = [f"{key}={value}" for key, value in given.items() if value is not None]
    if no_baseline:
        overrides.append("baselines=[]")
    elif baseline:
        names = [
            "window_only",
            *(f"window_{name}".replace("-", "_").replace("window_window", "window") for name in baseline),
        ]
        overrides.append(f"baselines=[{', '.join(dict.fromkeys(names))}]")
    return recipes.read(source, [*overrides, *set_])


def main() -> None:
    """The entry point; `--debug`, anywhere in the arguments, shows tracebacks."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    sys.exit(guarded(lambda: app(arguments, standalone_mode=False), debug="--debug" in sys.argv))


def guarded(command: Callable[[], Any], debug: bool = False) -> int:
    """Run `command`; its exit code. What a person or a disk got wrong is one line on stderr, and 2."""
    from linearize.errors import LinearizeError

    try:
        return int(command() or 0)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, LinearizeError):
            message = str(error)
        elif hasattr(error, "format_message"):  # a usage error, whichever click typer runs on
            message = error.format_message()
        elif isinstance(error, OSError):
            message = f"{error.filename or 'disk or network'}: {error.strerror or error}"
        else:
            raise
        if debug:
            raise
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        return 2
