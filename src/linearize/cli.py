"""The command line: one typed function a command. Flag = argument name = recipe key."""

import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="linearize",
    help="Turn pretrained transformer language models into gated linear recurrent ones.",
    epilog="--debug, anywhere, adds the traceback to an error.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

bench = typer.Typer(help="Measure what models of a kind can do, apart from any checkpoint.", no_args_is_help=True)
app.add_typer(bench, name="bench")

Out = Annotated[Path, typer.Option(help="Folder for the result: new or empty.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is in the folder already.")]
OverwriteFile = Annotated[bool, typer.Option("--overwrite", help="Replace a file of that name.")]
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
Data = Annotated[str | None, typer.Option(help="Training text: wiki, self, a file, a folder, or a hub data set.")]
Heldout = Annotated[str | None, typer.Option(help="Text to measure on, of the same kinds.")]
Structure = Annotated[str | None, typer.Option(help="The recurrence; none leaves the window alone.")]
Window = Annotated[int | None, typer.Option(help="Tokens that softmax attention sees.")]
Sinks = Annotated[int | None, typer.Option(help="First tokens that softmax attention always sees.")]
GateTemperature = Annotated[float | None, typer.Option(help="The log decay is divided by it.")]
Mixing = Annotated[str | None, typer.Option(help="The recurrence's weight: fixed, or per_head, learned.")]
MixingWeight = Annotated[float | None, typer.Option(help="Its value, or where it starts.")]
Layers = Annotated[str | None, typer.Option(help="Layers to convert: all, or numbers and ranges like 0-7,16.")]
Suite = Annotated[
    str | None, typer.Option(help="quick, or full: late gap by length, recall, benchmarks and generation as well.")
]
Limit = Annotated[int | None, typer.Option(help="Items of each benchmark, and prompts, at most.")]
SoftmaxEvery = Annotated[int | None, typer.Option(help="Leave every N-th layer as softmax attention.")]
SoftmaxHeads = Annotated[
    str | None, typer.Option(help="Key/value heads to leave as softmax attention, layer/head like 8/0,17/1-2.")
]


@app.command()
def run(
    out: Out,
    recipe: RecipeName = "default",
    model: Model = None,
    data: Data = None,
    heldout: Heldout = None,
    structure: Structure = None,
    window: Window = None,
    sinks: Sinks = None,
    gate_temperature: GateTemperature = None,
    mixing: Mixing = None,
    mixing_weight: MixingWeight = None,
    layers: Layers = None,
    softmax_every: SoftmaxEvery = None,
    softmax_heads: SoftmaxHeads = None,
    baseline: Baselines = [],  # noqa: B006 - typer's way of a repeated option
    no_baseline: NoBaseline = False,
    set_: Set = [],  # noqa: B006
    overwrite: Overwrite = False,
) -> None:
    """Do the whole job: convert, align, distill, eval, report.

    What is interrupted goes on from where it was when the same command is given again.
    """
    flags = locals() | {"baselines": _baselines(baseline, no_baseline)}
    from linearize import report as reports
    from linearize.run import run as run_recipe

    report = run_recipe(_recipe(recipe, set_, flags), out, overwrite)
    print(reports.table(report))
    print(f"\n{reports.verdict(report)}\n\n{out / 'report.html'}")


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="An embedded model's name, a folder, or a hub name owner/name.")],
    out: Out,
    structure: Structure = None,
    window: Window = None,
    sinks: Sinks = None,
    gate_temperature: GateTemperature = None,
    mixing: Mixing = None,
    mixing_weight: MixingWeight = None,
    layers: Layers = None,
    softmax_every: SoftmaxEvery = None,
    softmax_heads: SoftmaxHeads = None,
    set_: Set = [],  # noqa: B006
    overwrite: Overwrite = False,
) -> None:
    """Swap softmax attention for Liger Attention, without training.

    What is not given is as in the default recipe.
    """
    flags = locals()
    from linearize.run import convert_only

    convert_only(_recipe("default", set_, flags), out, overwrite)
    print(out)


@app.command()
def align(
    checkpoint: Checkpoint,
    out: Out,
    recipe: RecipeName = "default",
    set_: Set = [],  # noqa: B006
    overwrite: Overwrite = False,
) -> None:
    """Train converted layers, each to give the teacher's output.

    LoRA stays beside the weights, so that distill goes on with it.
    """
    from linearize.run import stage_only

    stage_only("align", checkpoint, _recipe(recipe, set_), out, overwrite)
    print(out)


@app.command()
def distill(
    checkpoint: Checkpoint,
    out: Out,
    recipe: RecipeName = "default",
    set_: Set = [],  # noqa: B006
    overwrite: Overwrite = False,
) -> None:
    """Train a converted or aligned checkpoint as a whole.

    It learns to give the teacher's distribution of the next token.
    """
    from linearize.run import stage_only

    stage_only("distill", checkpoint, _recipe(recipe, set_), out, overwrite)
    print(out)


@app.command("eval")
def evaluate(
    checkpoint: Checkpoint,
    suite: Suite = None,
    limit: Limit = None,
    heldout: Heldout = None,
    seed_of: Annotated[
        list[Path],
        typer.Option(help="A checkpoint of another seed that has its full report: late gaps are pooled with its."),
    ] = [],  # noqa: B006
    baseline: Baselines = [],  # noqa: B006
    no_baseline: NoBaseline = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a report that has more.")] = False,
    set_: Set = [],  # noqa: B006
) -> None:
    """Measure a checkpoint and write its report.

    It is compared with its teacher and with matched baselines, which are trained here if need be.
    """
    from linearize import report as reports
    from linearize.checkpoint import read_recipe
    from linearize.run import evaluate_only

    given = {
        "evaluation.suite": suite,
        "evaluation.limit": limit,
        "data.heldout": heldout,
        "baselines": _baselines(baseline, no_baseline),
    }
    given = {key: value for key, value in given.items() if value is not None}
    report = evaluate_only(checkpoint, read_recipe(checkpoint, set_, given), seed_of, overwrite)
    print(reports.table(report))
    print(f"\n{reports.verdict(report)}\n\n{checkpoint / 'report.html'}")


@app.command()
def report(checkpoint: Checkpoint) -> None:
    """Draw report.html again from report.json."""
    from linearize import report as reports
    from linearize.errors import LinearizeError
    from linearize.results import read

    if not checkpoint.is_dir():
        raise LinearizeError(f"there is no checkpoint folder {str(checkpoint)!r}; give one that linearize wrote")
    reports.write(read(checkpoint), checkpoint)
    print(checkpoint / "report.html")


@app.command()
def merge(checkpoint: Checkpoint, out: Out, overwrite: Overwrite = False) -> None:
    """Merge a checkpoint's LoRA adapter into its weights."""
    from linearize.run import merge_only

    merge_only(checkpoint, out, overwrite)
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
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Generate text, word by word.

    In constant memory, but for what stays softmax attention.
    """
    from linearize.generate import generate as stream

    stream(checkpoint, prompt, chat, max_new_tokens, temperature, seed)


@app.command("inspect")
def inspect_(
    model: Annotated[str, typer.Argument(help="A checkpoint, an embedded model's name, a folder, or a hub name.")],
    context: Annotated[list[int], typer.Option(min=1, help="Context lengths to price.")] = [1024, 16384, 131072],  # noqa: B006
) -> None:
    """Show layers, parameters and memory.

    The cache's bytes, by context, against the original model's.
    """
    from linearize.inspect import show

    show(model, context)


@app.command()
def select(
    model: Annotated[str, typer.Argument(help="An embedded model's name, a folder, or a hub name owner/name.")],
    keep: Annotated[int, typer.Option(min=1, help="How many to leave as softmax attention.")] = 3,
    heads: Annotated[bool, typer.Option("--heads", help="Choose key/value heads, not whole layers.")] = False,
    selector: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="late, recall, both, gradient or align; else late, of heads gradient."),
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Score each beside those already chosen.")] = False,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences that late loss is measured on.")] = 4,
    trials: Annotated[int, typer.Option(min=1, help="Needles of each length.")] = 8,
    tokens: Annotated[str, typer.Option(help="To align on, with align.")] = "32K",
    out: Annotated[Path | None, typer.Option(help="File for all scores, as JSON.")] = None,
    overwrite: OverwriteFile = False,
    data: Annotated[
        str | None, typer.Option(help="Text to choose by: wiki, a file, a folder, or a hub data set.")
    ] = None,
    structure: Structure = None,
    window: Window = None,
    sinks: Sinks = None,
    set_: Set = [],  # noqa: B006
) -> None:
    """Choose the layers or heads to leave as softmax attention.

    By what leaving each of them full gains in an untrained conversion: late loss, a needle's recall, or both, or late
    loss to first order; or by how badly a layer aligns. Prints scores and the key of a recipe that leaves them.
    """
    flags = locals()
    from linearize.files import check_file, write_text
    from linearize.recipe import parse_tokens
    from linearize.select import select as choose
    from linearize.select import table

    if out is not None:
        check_file(out, overwrite)
    given = keep, selector, greedy, sequences, trials, parse_tokens(tokens), heads
    chosen = choose(_recipe("default", set_, flags), *given)
    if out is not None:
        write_text(out, chosen.model_dump_json(indent=1) + "\n")
    print(table(chosen))
    print(f"\n{chosen.key}: {chosen.value}")


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="An embedded model's name, a folder, or a hub name owner/name.")],
    out: Annotated[Path, typer.Option(help="File to write: .jsonl, .jsonl.gz or .jsonl.xz.")],
    overwrite: OverwriteFile = False,
    tokens: Annotated[str, typer.Option(help="How many, at least.")] = "2M",
    length: Annotated[int, typer.Option(min=2, help="Tokens of a document, at most.")] = 1024,
    temperature: Annotated[float, typer.Option(help="1 is the model's own distribution.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    rows: Annotated[int | None, typer.Option(min=1, help="Documents at once; by default as memory allows.")] = None,
) -> None:
    """Write text that a model samples, to train on with --data.

    Half of it chats, if it has a chat template, half plain text. A run with --data self samples for itself.
    """
    from linearize.files import check_file
    from linearize.recipe import parse_tokens
    from linearize.train.sample import export

    check_file(out, overwrite)
    documents, written = export(model, parse_tokens(tokens), out, length, temperature, seed, rows)
    print(f"{out}: {documents:,} documents, {written:,} tokens")


@bench.command("state-tracking")
def state_tracking(
    structure: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="Train this structure; the delta rule's with both eigenvalue ranges."),
    ] = [],  # noqa: B006
    task: Annotated[list[str], typer.Option(metavar="NAME", help="parity, arithmetic, brackets or s5.")] = [],  # noqa: B006
    format_: Annotated[
        list[str], typer.Option("--format", metavar="NAME", help="direct: answer alone; scratchpad: states as well.")
    ] = [],  # noqa: B006
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="small, for a CPU, or full, for a GPU; by default as there is one."),
    ] = None,
    set_: Set = [],  # noqa: B006
    steps: Annotated[int | None, typer.Option(help="Training steps of each pair.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of a step.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights and data.")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="Stop after so long; the same command then goes on.")
    ] = None,
    no_graph: Annotated[bool, typer.Option("--no-graph", help="Use no CUDA graphs.")] = False,
    out: Out = Path("out/state-tracking"),
) -> None:
    """Train small models on parity, modular arithmetic and S5.

    Prints scaled accuracy on rows longer than in training, and in brackets on rows as long: 0 is chance, 1 is all
    right. Results that are in the folder are kept.
    """
    from linearize.evaluate import state_tracking as tracking

    given = {"steps": steps, "batch": batch, "seed": seed}
    settings, chosen = tracking.choose(preset, set_, given, structure, task, format_)
    done = tracking.run(chosen, settings, out, seconds, graph=not no_graph)
    print(tracking.table(tracking.results(out)))
    if not done:
        print("\ntime is up; the same command goes on from here")
    print(f"\n{out / 'state-tracking.json'}")


FLAGS = {  # of a recipe's keys: flag -> key
    **{flag: flag for flag in ("model", "layers", "softmax_every", "softmax_heads", "baselines")},
    **{
        flag: f"mixer.{flag}"
        for flag in ("structure", "window", "sinks", "gate_temperature", "mixing", "mixing_weight")
    },
    "data": "data.train",
    "heldout": "data.heldout",
}


def _recipe(source: str, set_: list[str], flags: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """The recipe called `source` with `--set` and, of a command's arguments, the flags that were given."""
    from linearize import recipe as recipes

    given = {key: flags[flag] for flag, key in FLAGS.items() if flags.get(flag) is not None}
    return recipes.read(source, set_, given)


def _baselines(names: list[str], none: bool) -> list[str] | None:
    """The recipe's `baselines` by the flags; None leaves it as it is. A second baseline comes after the first."""
    from linearize.errors import LinearizeError, unknown

    if none and names:
        raise LinearizeError(f"--no-baseline contradicts --baseline {names[0]}; give one of them")
    known = {"window-only": "window_only", "equal-memory": "window_equal_memory"}
    for name in names:
        if name not in known:
            raise unknown("baseline", name, known)
    return list(dict.fromkeys(["window_only", *map(known.__getitem__, names)])) if names else [] if none else None


def main(given: list[str] | None = None) -> int:
    """The entry point, which returns the exit code; `--debug`, anywhere in the arguments, shows tracebacks."""
    given = sys.argv[1:] if given is None else given
    arguments = [argument for argument in given if argument != "--debug"] or ["--help"]
    with warnings.catch_warnings():
        if "--debug" not in given:
            _hush()
        return guarded(lambda: app(arguments, prog_name="linearize", standalone_mode=False), debug="--debug" in given)


def _hush() -> None:
    """Only our own words: no remarks of the libraries, no bars of transformers over files that load in a moment."""
    import huggingface_hub
    import transformers

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    huggingface_hub.utils.enable_progress_bars()  # downloads do take long


def guarded(command: Callable[[], Any], debug: bool = False) -> int:
    """Run `command`; its exit code. What a person or a disk got wrong is one line on stderr, and 2."""
    try:
        code = int(command() or 0)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        message = _message(error)
        if debug or message is None:
            raise
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        return 2
    if code == 130:  # typer's code for Ctrl-C
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
    return code


def _message(error: Any) -> str | None:
    """What a person should read of an error that is theirs or their disk's; None for one of this program."""
    from linearize.errors import LinearizeError

    if isinstance(error, LinearizeError):
        return str(error)
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
        return f"there is too little memory for what was asked ({str(error).split(':')[-1].strip()})"
    if isinstance(error, OSError):
        return f"{error.filename or 'disk or network'}: {error.strerror or error}"
    if not hasattr(error, "format_message"):
        return None
    message = error.format_message()  # a usage error, whichever click typer runs on
    context = getattr(error, "ctx", None)
    if context is None or not message.startswith("No such"):
        return message
    options = [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]
    return f"{message.rstrip('.')}; valid: {', '.join([*getattr(context.command, 'commands', {}), *options])}"
