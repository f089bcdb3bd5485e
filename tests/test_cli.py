"""Every bad input is one line that says what was given and what is valid, exit code 2, and leaves nothing behind."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import checkpoint, text, tiny, tokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import linearize
from linearize import LinearizeError, cli, variants
from linearize.assets import quick_hub

SMALL = (  # a run of seconds
    "run --out out --model llama --data text.txt --window 8 --heldout heldout.txt --set data.sequence_length=32 "
    "--set align.tokens=64 --set distill.tokens=64 --set evaluation.sequence_length=48 --set evaluation.sequences=2 "
    "--set evaluation.contexts=[24] --set evaluation.decode_tokens=2 --set lora.r=2"
)
OTHERS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2)),
    "bert": lambda: BertForMaskedLM(
        BertConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=97, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    ),
}
FAMILIES = "llama, mistral, mixtral"

REFUSED = [  # what is added to SMALL (the last of a repeated flag counts), and the words of the answer
    ("--model nosuch", "'nosuch' valid: smollm2-135m folder owner/name"),
    ("--model text.txt", "/text.txt' file valid: smollm2-135m folder"),
    ("--model owner/name", "'owner/name' hub"),
    ("--model other", "/other' model_type"),
    ("--model gpt2", f"'gpt2' valid: {FAMILIES}"),
    ("--model bert", f"'bert' BertForMaskedLM valid: decoders {FAMILIES}"),
    ("--model t5", f"'t5' encoder-decoder valid: decoders {FAMILIES}"),
    ("--structure foo", "structure 'foo' valid: deltanet, gated_deltanet"),
    ("--window 0", "window 0 greater than or equal to 1"),
    ("--window x", "--window valid integer"),
    ("--layers 0-9", "'0-9' layer 9; this model's layers are 0-2"),
    ("--layers 1-99999999999", "99999999999 layers are 0-2"),
    ("--layers 3", "'3' layers are 0-2"),
    ("--layers a", "'a' all '0-7,16'"),
    ("--layers 2-1", "'2-1' all '0-7,16'"),
    ("--softmax-every 0", "softmax_every 0 greater than or equal to 1"),
    ("--softmax-every 1", "softmax_every 1 no layer"),
    ("--baseline foo", "baseline 'foo' valid: equal-memory, window-only"),
    ("--baseline equal-memory --no-baseline", "--no-baseline --baseline equal-memory one of them"),
    ("--flag", "--flag valid: --out --window --set"),
    ("nosuch", "recipe 'nosuch' valid: default demo liger-paper .yaml"),
    ("nosuch.yaml", "'nosuch.yaml' default demo liger-paper"),
    ("latin.yaml", "latin.yaml is not a YAML recipe"),
    (
        "--set a=1 --set mixer.b=1 --set distill.c=1",
        "'a' model, 'b' structure, 'distill.c' tokens,",
    ),
    ("--set seed", "'seed' key=value"),
    ("--set seed=-1", "seed -1 greater than or equal to 0"),
    ("--set align.tokens=-5", "align.tokens -5 greater than or equal to 1"),
    ("--set align.tokens=many", "'many' tokens 30K 2.5M"),
    ("--set mixer=[1", "'mixer=[1' no valid value"),
    ("--set lora.targets=[foo]", "['foo'] valid: q_proj, v_proj"),
    ("--set lora.targets=[]", "lora.targets at least 1"),
    ("--set evaluation.contexts=[0]", "evaluation.contexts.0 0 greater than or equal to 1"),
    ("--set evaluation.contexts=[]", "evaluation.contexts at least 1"),
    ("--set evaluation.sequence_length=100000", "heldout.txt longest tokens 100000"),
    ("--set data.heldout=short.txt", "short.txt longest 3 tokens 48"),
    ("--set data.heldout=missing.txt", "missing.txt file folder owner/name"),
    ("--data empty.txt", "empty.txt no text"),
    ("--data latin.txt", "latin.txt not UTF-8 at byte 3"),
    ("--data short.txt", "short.txt 3 tokens 32"),
    ("--data missing.txt", "missing.txt file folder owner/name"),
    ("--data other", "other .jsonl .txt .parquet"),
    ("--data nosuch", "'nosuch' wiki .jsonl owner/name"),
    ("--data owner/name", "owner/name connect local file or folder"),
    ("--out other", "other something else new, empty"),
    ("--out text.txt", "text.txt is a file new, empty"),
    ("--out text.txt/x", "text.txt/x Not a directory"),
    ("--out /proc/x", "/proc/x cannot write"),
]
REFUSED_ALONE = [
    ("bogus", "'bogus' valid: run convert inspect"),
    ("--bogus", "--bogus valid: run convert inspect"),
    ("run", "--out"),
    ("convert nosuch --out c", "'nosuch' valid: smollm2-135m"),
    ("convert llama --out llama", "llama something else new, empty"),
    ("convert llama --out c --layers 7", "'7' layers are 0-2"),
    ("convert converted --out c", "linearized already"),
    ("convert llama --out c --structure foo", "'foo' valid: deltanet, gated_deltanet"),
    ("align converted --out converted", "converted source another --out"),
    ("align llama --out c", "llama recipe.yaml checkpoint that linearize wrote"),
    ("distill nosuch --out c", "'nosuch' one that linearize wrote"),
    ("merge converted --out c", "converted no adapter"),
    ("merge nosuch --out c", "'nosuch' one that linearize wrote"),
    ("eval nosuch", "'nosuch' one that linearize wrote"),
    ("eval other", "other recipe.yaml checkpoint that linearize wrote"),
    ("eval converted --set mixer.foo=1", "'foo' valid: structure"),
    ("eval converted --suite whole", "evaluation.suite 'whole' quick full"),
    ("eval converted --suite full --limit 0", "evaluation.limit 0 greater than or equal to 1"),
    (
        "eval converted --no-baseline --set data.heldout=heldout.txt --set evaluation.articles=7",
        "articles '7' heldout.txt numbers within 1-1",
    ),
    ("report nosuch", "'nosuch' one that linearize wrote"),
    ("report converted", "converted/report.json"),
    ("generate nosuch hi", "'nosuch' one that linearize wrote"),
    ("generate other hi", "other config.json checkpoint"),
    ("generate converted ''", "prompt empty"),
    ("generate converted hi --chat", "converted chat template"),
    ("generate converted hi --temperature inf", "temperature inf valid: 0"),
    ("generate converted hi --max-new-tokens 0", "--max-new-tokens greater than or equal to 1"),
    ("generate converted hi --seed -1", "--seed greater than or equal to 0"),
    ("sample llama --out text.jsonl", "text.jsonl already --overwrite"),
    ("sample llama --out text.txt --overwrite", "text.txt .jsonl .jsonl.gz .jsonl.xz"),
    ("select llama --out text.txt", "text.txt already --overwrite"),
    ("inspect nosuch", "'nosuch' valid: smollm2-135m"),
    ("inspect other", f"'other' model_type {FAMILIES}"),
    ("inspect llama --context 0", "--context greater than or equal to 1"),
]
TAMPERED = {  # a file of a checkpoint, what becomes of its bytes (None: removed), and words of the answer
    "weights truncated": ("model.safetensors", lambda b: b[:-9], "model.safetensors truncated or changed"),
    "weights changed": ("model.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1]), "model.safetensors changed"),
    "weights missing": ("model.safetensors", None, "lacks model.safetensors"),
    "config truncated": ("config.json", lambda b: b[:40], "config.json truncated or changed"),
    "config changed": ("config.json", lambda b: b.replace(b'"window": 8', b'"window": 9'), "config.json changed"),
    "tokenizer truncated": ("tokenizer.json", lambda b: b[:40], "tokenizer.json truncated or changed"),
    "recipe changed": ("recipe.yaml", lambda b: b.replace(b"seed: 0", b"seed: 1"), "recipe.yaml changed"),
    "marker truncated": ("linearize.json", lambda b: b[:40], "linearize.json damaged"),
    "marker without sums": ("linearize.json", lambda b: b"{}", "linearize.json damaged 'sha256'"),
    "marker leads out": ("linearize.json", lambda b: b'{"sha256": {"../x": ""}}', "linearize.json outside '../x'"),
}
UNMARKED = {  # the same where the marker is gone too
    "weights truncated": ("model.safetensors", lambda b: b[:-9], "'broken'"),
    "config truncated": ("config.json", lambda b: b[:40], "config.json damaged"),
    "config of another family": ("config.json", lambda b: b.replace(b"linearized_llama", b"gpt2"), f"gpt2 {FAMILIES}"),
    "config without mixer": ("config.json", lambda b: b.replace(b'"mixer"', b'"mixture"'), "'linearize' mixer"),
    "config with a bad window": (
        "config.json",
        lambda b: b.replace(b'"window": 8', b'"window": 0'),
        "window 0 equal to 1",
    ),
    "tokenizer truncated": ("tokenizer.json", lambda b: b[:40], "'broken'"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder of models, texts, and a checkpoint of ours."""
    folder = tmp_path_factory.mktemp("made")
    checkpoint(folder / "llama")
    for name, build in OTHERS.items():
        build().save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    for name, content in {
        "text.txt": text(4000),
        "text.jsonl": "{}",
        "heldout.txt": text(4000, 1),
        "empty.txt": " \n",
        "short.txt": "hi",
    }.items():
        (folder / name).write_text(content)
    for name in ("latin.txt", "latin.yaml"):
        (folder / name).write_bytes("caf\xe9 ".encode("latin-1") * 50)
    (folder / "other").mkdir()
    (folder / "other" / "keep").write_text("mine")
    arguments = ["convert", str(folder / "llama"), "--out", str(folder / "converted"), "--window", "8"]
    assert cli.main(arguments) == 0
    return folder


@pytest.fixture
def here(made, monkeypatch):
    """`made` as the working folder; fails if the test leaves anything in it."""
    monkeypatch.chdir(made)
    before = tree(made)
    yield made
    assert tree(made) == before


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def assert_refused(arguments: list[str], words: str, capsys) -> None:
    """One line on stderr that holds all the words, and exit code 2."""
    capsys.readouterr()
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert [word for word in words.split() if word not in err] == [], err


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=[case[0] for case in REFUSED])
def test_run_refuses_before_training(arguments, words, here, capsys, monkeypatch):
    monkeypatch.setattr(variants, "train", lambda *_: pytest.fail("it trained"))
    assert_refused(f"{SMALL} {arguments}".split(), words, capsys)


@pytest.mark.parametrize(("arguments", "words"), REFUSED_ALONE, ids=[case[0] for case in REFUSED_ALONE])
def test_commands_refuse(arguments, words, here, capsys):
    assert_refused(["" if word == "''" else word for word in arguments.split()], words, capsys)


@pytest.mark.parametrize("case", TAMPERED)
def test_tampered_checkpoint(case, made, tmp_path, monkeypatch, capsys):
    file, change, words = TAMPERED[case]
    broken(made, tmp_path, file, change)
    monkeypatch.chdir(tmp_path)
    for arguments in ("generate broken hi", "inspect broken", "merge broken --out c", "eval broken --no-baseline"):
        assert_refused(arguments.split(), words, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("case", UNMARKED)
def test_tampered_checkpoint_without_marker(case, made, tmp_path, monkeypatch, capsys):
    file, change, words = UNMARKED[case]
    broken(made, tmp_path, file, change)
    (tmp_path / "broken" / "linearize.json").unlink()
    monkeypatch.chdir(tmp_path)
    assert_refused(["generate", "broken", "hi"], words, capsys)


def broken(made: Path, folder: Path, file: str, change) -> None:
    """A copy of the checkpoint with one file changed."""
    shutil.copytree(made / "converted", folder / "broken")
    path = folder / "broken" / file
    before = path.read_bytes()
    path.unlink() if change is None else path.write_bytes(change(before))
    assert change is None or path.read_bytes() != before


@pytest.mark.parametrize("recipe", ["mixer: [", "- 1", "seed: x\n", "nonsense: 1\n"])
def test_tampered_recipe(recipe, made, tmp_path, capsys):
    broken(made, tmp_path, "recipe.yaml", lambda _: recipe.encode())
    assert_refused(["eval", str(tmp_path / "broken")], "recipe", capsys)


@pytest.mark.parametrize("content", ["", "[]", '{"model": 1}'])
def test_tampered_report(content, made, tmp_path, capsys):
    shutil.copytree(made / "converted", tmp_path / "broken")
    (tmp_path / "broken" / "report.json").write_text(content)
    assert_refused(["report", str(tmp_path / "broken")], "report.json not a whole report", capsys)
    assert not (tmp_path / "broken" / "report.html").exists()


def test_missing_weights(tmp_path, capsys):
    """transformers would start them at random."""
    model = tiny(eos_token_id=1)
    state = {key: value for key, value in model.state_dict().items() if "layers.1.mlp" not in key}
    model.save_pretrained(tmp_path / "part", state_dict=state)
    tokenizer().save_pretrained(tmp_path / "part")
    assert_refused(["inspect", str(tmp_path / "part")], "part lacks weights layers.1.mlp", capsys)


@pytest.mark.parametrize("fails_in", ["model", "tokenizer", "trained weights"])
def test_full_disk(fails_in, here, capsys, monkeypatch):
    """Rust and torch raise classes of their own."""
    owner, name, error = {
        "model": (PreTrainedModel, "save_pretrained", OSError(28, "No space left on device")),
        "tokenizer": (PreTrainedTokenizerFast, "save_pretrained", Exception("No space left (os error 28)")),
        "trained weights": (variants, "save_file", RuntimeError("[enforce fail at inline_container.cc:672]")),
    }[fails_in]

    def save(*_, **__):
        raise error

    monkeypatch.setattr(owner, name, save)
    capsys.readouterr()
    assert cli.main(f"{SMALL} --no-baseline".split()) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: cannot write ")
    assert "disk with space" in last
    kept = ["converted-align", "converted-distill"] if fails_in == "trained weights" else ["converted"]
    assert sorted(path.name for path in Path("out.work").glob("*/*")) == kept  # what was trained is kept on purpose
    shutil.rmtree("out.work")


def test_real_small_and_read_only_disks(made, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    for options, words in (("size=40k", "No space left on device"), ("ro", "Read-only file system")):
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(disk)], capture_output=True).returncode:
            pytest.skip("needs to be root")
        try:
            assert_refused(
                ["convert", str(made / "llama"), "--out", str(disk / "a" / "out")], f"{disk}/a/out {words}", capsys
            )
            assert list(disk.iterdir()) == []
        finally:
            subprocess.run(["umount", str(disk)], check=True)


def test_whole_run(made, tmp_path, capsys, monkeypatch):
    for name in ("llama", "text.txt", "heldout.txt"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    assert cli.main(SMALL.split()) == 0
    out, err = capsys.readouterr()
    assert "| converted " in out
    assert out.endswith("out/report.html\n")
    assert "Warning" not in err
    assert "shards" not in err
    assert cli.main(SMALL.split()) == 0
    assert "already" in capsys.readouterr().err
    assert cli.main(["report", "out"]) == 0
    assert cli.main(["inspect", "out", "--context", "100"]) == 0
    assert cli.main(["generate", "out", "the window", "--max-new-tokens", "3"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "text.txt", "heldout.txt", "out", "out.work"}


def test_nan_leaves_no_empty_folders(here, monkeypatch, capsys):
    def train(*arguments):
        arguments[-2].mkdir(parents=True)
        raise LinearizeError("the loss is nan at step 1 of 2; try a lower learning_rate")

    monkeypatch.setattr(variants, "train", train)
    assert_refused(SMALL.split(), "nan step 1 of 2 learning_rate", capsys)


def test_library_raises_the_same(here):
    with pytest.raises(LinearizeError, match="unknown structure 'foo'; valid: deltanet, gated_deltanet"):
        linearize.convert(tiny(), structure="foo")
    with pytest.raises(LinearizeError, match="no checkpoint folder 'nosuch'"):
        linearize.load("nosuch")
    with pytest.raises(LinearizeError, match="other holds something else"):
        linearize.run(linearize.Recipe(), "other")


def test_debug_shows_the_traceback(here):
    with pytest.raises(LinearizeError):
        cli.main(["inspect", "nosuch", "--debug"])


def test_errors_of_ours_are_not_hidden():
    with pytest.raises(KeyError):
        cli.guarded(lambda: {}["bug"])


def test_interrupt(monkeypatch, here, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("linearize.inspect.show", stop)
    assert cli.main(["inspect", "llama"]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_hub_without_an_answer_is_asked_once(monkeypatch):
    import huggingface_hub as hub

    def session():
        raise OSError("Name or service not known")

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.utils, "get_session", session)
    with quick_hub():
        assert hub.constants.HF_HUB_OFFLINE
    assert not hub.constants.HF_HUB_OFFLINE


def test_help(capsys):
    assert cli.main([]) == 0
    overview = capsys.readouterr().out
    assert "..." not in overview.split("Commands:")[1]  # no summary is cut
    for command in cli.app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        assert name in overview
        assert cli.main([name, "--help"]) == 0
        assert f"linearize {name}" in capsys.readouterr().out


def test_entry_point_exits_with_the_code(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from linearize.cli import main; sys.exit(main())", "eval", "nosuch"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert list(tmp_path.iterdir()) == []
