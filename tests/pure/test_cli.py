"""The command line: its flags (frozen), where values come from, chat and generate on a fake
model, errors and exit codes. Loads no torch."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from huggingface_hub import constants

import shoal.llm
from shoal.cli import chat as chat_module
from shoal.cli import main as main_module
from shoal.cli import options
from shoal.cli.chat import Conversation
from shoal.cli.main import COMMANDS, main
from shoal.cli.options import read_config_file, read_environment
from shoal.cli.talk import Piece, RemoteTalker
from shoal.cli.terminal import printable
from shoal.core.errors import ConfigError, InvalidRequestError, RequestError, UnavailableError
from shoal.core.request import SamplingParams
from shoal.llm import Choice, Chunk, Completion
from shoal.model import store
from shoal.model.store import ResolvedModel

Run = Callable[..., tuple[int, str, str]]

ENGINE = (
    "--dtype --quantize --kv-cache-dtype --kernels --device --max-model-len --num-threads "
    "--plan --tensor-parallel-size --pipeline-parallel-size --kv-split "
    "--chat-template --revision --hf-token"
)
SAMPLING = "--max-tokens --temperature --top-p --top-k --seed --stop"
GOLDEN = {
    "": "--version --help",
    "serve": f"{ENGINE} --config --help --host --port --api-key --served-model-name --cluster "
    "--data-parallel-size --drain-timeout --request-timeout --record --max-num-seqs --max-waiting "
    "--batching --tpot-target --collapse --no-collapse "
    "--router-policy --hedging --no-hedging --slo --upstream --upstream-key "
    "--max-num-batched-tokens --kv-cache-memory-bytes --weights-memory-bytes "
    "--enable-prefix-caching --no-enable-prefix-caching "
    "--activation-format --expert-redeal --no-expert-redeal",
    "route": "--upstream --upstream-key --model-name --host --port --api-key --router-policy "
    "--hedging --no-hedging --slo --max-waiting --drain-timeout --request-timeout --config --help",
    "chat": f"{ENGINE} {SAMPLING} --config --help --url --api-key --system",
    "generate": f"{ENGINE} {SAMPLING} --config --help --chat --raw --json",
    "eval": "--text --context --stride --max-tokens --dtype --quantize --kv-cache-dtype --kernels "
    "--against --against-dtype --against-quantize --against-kv-cache-dtype --against-kernels "
    "--device --num-threads --revision --hf-token --json --config --help",
    "quantize": "--output --format --group-size --include-head --revision --hf-token --json --help",
    "lab": "--help",
    "lab up": "--port --namespaces --no-namespaces --plan --name --help",
    "probe": "--output --lab --namespaces --no-namespaces --model --precision --seconds --refresh "
    "--from --cluster --api-key --json --help",
    "lab down": "--name --help",
    "lab slow": "--name --help",
    "lab stop": "--name --help",
    "lab kill": "--name --help",
    "lab cut": "--name --help",
    "lab heal": "--name --help",
    "lab status": "--json --name --help",
    "up": "--interface --address --name --help",
    "join": "--token --interface --address --name --help",
    "down": "--help",
    "plan": "--cluster --workload --rate --input-tokens --isl --output-tokens --osl "
    "--max-model-len --slo --objective --cost-unit --precision --max-quality-loss "
    "--kv-cache-precision --max-num-seqs --engine --what-if --explain --roles --no-roles --emit "
    "--json --output --help",
    "doctor": "--cluster --plan --model --with --port --all --strict --json --help",
    "replay": "--json --help",
    "models": "--json --help",
    "models pull": "--revision --hf-token --help",
    "models remove": "--yes --help",
    "bench": "--workload --rate --num-requests --input-tokens --output-tokens --time-scale "
    "--max-concurrency --slo --seed --model --api-key --chat --vocab-size --ignore-eos "
    "--no-ignore-eos --temperature --timeout --json --output --help",
}
"""A flag that vanishes or changes its name breaks somebody's script: change this knowingly."""


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERMINAL_WIDTH", "300")
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("SHOAL_DEBUG", raising=False)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `shoal ARGS` in this process; (exit code, stdout, stderr)."""

    def run(*args: str, stdin: str | io.TextIOBase = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["shoal", *args])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        with pytest.raises(SystemExit) as left:
            main()
        told = capsys.readouterr()
        return int(left.value.code or 0), told.out, told.err

    return run


# --- the shape of it ---


@pytest.mark.parametrize("command", GOLDEN)
def test_flags_are_frozen(command: str, run: Run) -> None:
    code, out, _ = run(*command.split(), "--help")
    assert code == 0
    shown = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", shown)) == set(GOLDEN[command].split())


def test_help_lists_every_command(run: Run) -> None:
    _, out, _ = run("--help")
    assert {name for name in COMMANDS if re.search(rf"│ {name} ", out)} == set(COMMANDS)


def test_version(run: Run) -> None:
    code, out, _ = run("--version")
    assert (code, bool(re.fullmatch(r"shoal \d+\.\d+\.\d+\S*\n", out))) == (0, True)


@pytest.mark.parametrize("args", [["models"], ["--help"]])
def test_light_commands_load_no_torch_and_no_server(args: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['shoal', *{args}]\n"
        "from shoal.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'fastapi', 'uvicorn', 'tokenizers'} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["modles"], "Did you mean 'models'"),
        (["generate"], "Missing argument"),
        (["generate", "m", "hi", "--max-tokens", "zero"], "--max-tokens"),
        (["generate", "m", "hi", "--top-p", "2"], "--top-p"),
        (["serve", "--port", "99999"], "--port"),
    ],
)
def test_wrong_usage_exits_2(args: list[str], words: str, run: Run) -> None:
    code, _, err = run(*args)
    assert code == 2
    assert words in err


def test_an_error_is_one_line_and_exit_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run("generate", "smolm2-135m", "hi")
    assert (code, out) == (1, "")
    assert err == "error: there is no model 'smolm2-135m'; did you mean smollm2-135m?\n"
    monkeypatch.setenv("SHOAL_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["shoal", "generate", "smolm2-135m", "hi"])
    with pytest.raises(store.ModelNotFoundError):
        main()


def test_ctrl_c_exits_130_quietly(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "resolve", interrupted)
    assert run("generate", "m", "hi") == (130, "", "")


# --- values: command line over file over environment ---


@pytest.fixture
def show(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """A command that shows the values it got."""

    def command(
        model: options.Model = "default-model",
        port: options.Port = 8000,
        dtype: options.DType = "auto",
        served_model_name: options.ServedModelName = None,
        enable_prefix_caching: options.EnablePrefixCaching = True,
        chat_template: options.ChatTemplate = None,
        config: options.Config = None,
    ) -> None:
        told = {**locals(), "config": None}
        sys.stdout.write(json.dumps(told, default=str))

    module = type(sys)("shoal_test_command")
    module.command = command  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "shoal_test_command", module)
    monkeypatch.setitem(main_module.COMMANDS, "show", "shoal_test_command:command")

    def show(*args: str) -> dict[str, Any]:
        code, out, err = run("show", *args)
        assert code == 0, err
        return dict(json.loads(out))

    return show


def test_values_by_precedence(
    show: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "shoal.yaml"
    file.write_text("port: 2\nserved-model-name: one\nmodel: from-file\n")
    assert show()["port"] == 8000
    monkeypatch.setenv("SHOAL_PORT", "1")
    monkeypatch.setenv("SHOAL_DTYPE", "float32")
    monkeypatch.setenv("SHOAL_ENABLE_PREFIX_CACHING", "false")
    monkeypatch.setenv("SHOAL_SERVED_MODEL_NAME", "a,b")
    by_environment = show()
    assert by_environment["port"] == 1
    assert by_environment["enable_prefix_caching"] is False
    assert by_environment["served_model_name"] == ["a", "b"]
    by_file = show("--config", str(file))
    assert (by_file["port"], by_file["dtype"], by_file["model"]) == (2, "float32", "from-file")
    assert by_file["served_model_name"] == ["one"]
    by_hand = show("mine", "--port", "3", "--enable-prefix-caching", "--config", str(file))
    assert (by_hand["port"], by_hand["model"]) == (3, "mine")
    assert by_hand["enable_prefix_caching"] is True


def test_a_bad_config_file_ends_in_one_line(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "shoal.yaml"
    file.write_text("prot: 1\n")
    code, _, err = run("serve", "--config", str(file))
    assert (code, err) == (1, f"error: {file}: unknown key 'prot'; did you mean port?\n")


TYPES = {
    "port": int,
    "drain_timeout": float,
    "dtype": Literal["auto", "float32"],
    "enable_prefix_caching": bool,
    "served_model_name": list[str] | None,
    "max_model_len": int | None,
    "chat_template": Path | None,
    "host": str,
}


def test_config_file_in_yaml_and_json(tmp_path: Path) -> None:
    values = {
        "port": 1,
        "drain_timeout": 3,
        "dtype": "float32",
        "enable_prefix_caching": False,
        "served_model_name": ["a", "b"],
        "max_model_len": None,
        "chat_template": "x.jinja",
    }
    file = tmp_path / "c"
    file.write_text(json.dumps(values))
    assert read_config_file(file, TYPES) == values
    file.write_text("enable-prefix-caching: no\nserved_model_name: a\n")
    assert read_config_file(file, TYPES) == {
        "enable_prefix_caching": False,
        "served_model_name": ["a"],
    }
    file.write_text("# nothing\n")
    assert read_config_file(file, TYPES) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("port: '8000'", "port is '8000'; it must be a whole number"),
        ("port: true", "port is True; it must be a whole number"),
        ("port: 1.5", "port is 1.5; it must be a whole number"),
        ("drain-timeout: soon", "drain-timeout is 'soon'; it must be a number"),
        ("dtype: float8", "dtype is 'float8'; it must be one of auto, float32"),
        ("enable-prefix-caching: 1", "must be true or false"),
        ("served-model-name: [1]", "must be a list"),
        ("host: 2024-01-01\nport: {}", "port is {}"),
        ("host: 127", "host is 127; it must be text"),
        ("max_model_len: [4]", "max-model-len is [4]; it must be a whole number"),
        ("colour: red", "unknown key 'colour'; remove it"),
        ("max-model-len: 1\nmax_model_len: 2", "max-model-len stands there twice"),
        ("- port", "holds a list; write lines such as"),
        ("port: [", "is not YAML or JSON"),
        ("!!python/object/apply:os.system ['true']", "is not YAML or JSON"),
    ],
)
def test_config_file_errors_name_the_key(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(words)):
        read_config_file(file, TYPES)


def test_config_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_config_file(tmp_path / "none.yaml", TYPES)


def test_environment_ignores_what_is_empty() -> None:
    assert read_environment(TYPES, {"SHOAL_PORT": "", "SHOAL_HOST": "h", "PORT": "1"}) == {
        "host": "h"
    }


# --- a fake model ---


@dataclass
class FakeLLM:
    """Answers with the last message in capitals, word by word; refuses more than 6 messages."""

    path: str
    options: dict[str, Any]
    has_chat_template: bool = True
    closed: bool = False
    interrupt: bool = False
    cancelled: int = 0

    def __post_init__(self) -> None:
        self.asked: list[tuple[Any, SamplingParams]] = []

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.closed = True

    def stream(
        self,
        prompt: str | None = None,
        params: SamplingParams | None = None,
        *,
        messages: Sequence[dict[str, str]] | None = None,
    ) -> Iterator[Chunk]:
        self.asked.append((prompt if messages is None else list(messages), params or _GREEDY))
        if messages is not None and len(messages) > 5:
            raise InvalidRequestError("too long", code="context_length_exceeded")
        text = (prompt or "") if messages is None else messages[-1]["content"]
        finished = False
        try:
            for word in text.upper().split():
                yield Chunk(word + " ", (1,))
                if self.interrupt:
                    raise KeyboardInterrupt
            finished = True
            yield Chunk("", (2,), "stop")
        finally:
            self.cancelled += not finished

    def generate(self, prompts: list[str], params: SamplingParams) -> list[Completion]:
        return [self._completion(prompt, prompt, params) for prompt in prompts]

    def chat(
        self, conversations: list[list[dict[str, str]]], params: SamplingParams
    ) -> list[Completion]:
        return [self._completion(each, each[-1]["content"], params) for each in conversations]

    def _completion(self, asked: Any, text: str, params: SamplingParams) -> Completion:
        self.asked.append((asked, params))
        choice = Choice(
            index=0,
            text=text.upper(),
            token_ids=(1, 2, 3),
            finish_reason="length",
            stop_reason=None,
            logprobs=(),
            prompt_logprobs=(),
            num_cached_tokens=0,
            ttft_s=0.5,
            latency_s=1.5,
        )
        return Completion(prompt_ids=(7, 8), choices=(choice,))


_GREEDY = SamplingParams(temperature=0)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[FakeLLM]:
    """Every model opened from here on; all of them fakes."""
    opened: list[FakeLLM] = []

    def open_fake(path: str, *, progress: object, **options: Any) -> FakeLLM:
        opened.append(FakeLLM(path, options, **settings))
        return opened[-1]

    def resolve(model: str, **_: object) -> ResolvedModel:
        return ResolvedModel(model, Path("/models") / model, "f")

    settings: dict[str, Any] = {}
    monkeypatch.setattr(shoal.llm, "LLM", open_fake)
    monkeypatch.setattr(store, "resolve", resolve)
    monkeypatch.setattr(FakeLLM, "settings", settings, raising=False)
    return opened


# --- generate ---


def test_generate_streams_one_prompt(run: Run, models: list[FakeLLM]) -> None:
    code, out, err = run("generate", "m", "hello there", "--dtype", "float32", "--seed", "3")
    assert (code, out, err) == (0, "HELLO THERE \n", "")
    (llm,) = models
    assert llm.closed
    assert (llm.path, llm.options["dtype"]) == ("/models/m", "float32")
    ((asked, params),) = llm.asked
    assert asked == [{"role": "user", "content": "hello there"}]
    assert (params.seed, params.max_tokens, params.temperature) == (3, 256, 0.7)


@pytest.mark.parametrize(
    ("flags", "has_template", "as_chat"),
    [([], True, True), ([], False, False), (["--raw"], True, False), (["--chat"], True, True)],
)
def test_generate_takes_prompts_as_messages_where_it_can(
    flags: list[str], has_template: bool, as_chat: bool, run: Run, models: list[FakeLLM]
) -> None:
    FakeLLM.settings["has_chat_template"] = has_template  # type: ignore[attr-defined]
    run("generate", "m", "hi", *flags)
    asked = models[0].asked[0][0]
    assert asked == ([{"role": "user", "content": "hi"}] if as_chat else "hi")


def test_generate_several_and_from_stdin(run: Run, models: list[FakeLLM]) -> None:
    code, out, _ = run("generate", "m", "one", "-", "--stop", "a", "--stop", "b", stdin="two")
    assert (code, out) == (0, "> one\nONE\n\n> two\nTWO\n\n")
    assert models[0].asked[0][1].stop == ("a", "b")


def test_generate_reads_a_piped_prompt(run: Run, models: list[FakeLLM]) -> None:
    code, out, _ = run("generate", "m", stdin="two")
    assert (code, out.split()) == (0, ["TWO"])


def test_generate_without_a_prompt_on_a_terminal_is_wrong_usage(
    models: list[FakeLLM], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr(sys, "argv", ["shoal", "generate", "m"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert "PROMPT" in capsys.readouterr().err
    assert models == []


def test_generate_json(run: Run, models: list[FakeLLM]) -> None:
    code, out, _ = run("generate", "m", "one", "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["model"], told["load_s"] >= 0) == ("m", True)
    assert told["results"] == [
        {
            "prompt": "one",
            "text": "ONE",
            "finish_reason": "length",
            "num_prompt_tokens": 2,
            "num_cached_tokens": 0,
            "tokens": 3,
            "token_ids": [1, 2, 3],
            "ttft_s": 0.5,
            "tpot_s": 0.5,
            "latency_s": 1.5,
        }
    ]


@pytest.mark.parametrize(
    ("prompts", "words"), [(["-", "-"], "stdin can be read once"), (["-"], "a prompt is empty")]
)
def test_generate_refuses(prompts: list[str], words: str, run: Run, models: list[FakeLLM]) -> None:
    code, _, err = run("generate", "m", *prompts)
    assert code == 1
    assert words in err
    assert models == []


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_what_is_no_text_on_stdin_is_said(command: str, run: Run, models: list[FakeLLM]) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), "utf-8", "strict")
    code, _, err = run(command, "m", stdin=stdin)
    assert (code, err.splitlines()[-1].startswith("error: what came through stdin")) == (1, True)


def test_a_missing_chat_template_is_said(run: Run, models: list[FakeLLM]) -> None:
    code, _, err = run("generate", "m", "hi", "--chat-template", "/nowhere.jinja")
    assert code == 1
    assert "error: --chat-template /nowhere.jinja" in err


# --- chat ---


def test_chat_down_a_pipe(run: Run, models: list[FakeLLM]) -> None:
    code, out, err = run("chat", "m", "--system", "be kind", stdin="hello you\n\nand now\n")
    assert (code, out) == (0, "HELLO YOU \nAND NOW \n")
    assert err.count("[3 tokens, ") == 2
    assert models[0].closed
    assert models[0].asked[1][0] == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hello you"},
        {"role": "assistant", "content": "HELLO YOU "},
        {"role": "user", "content": "and now"},
    ]


def test_chat_default_model(run: Run, models: list[FakeLLM]) -> None:
    run("chat", stdin="")
    assert models[0].path == f"/models/{options.DEFAULT_MODEL}"


def test_chat_takes_several_lines(run: Run, models: list[FakeLLM]) -> None:
    run("chat", "m", stdin='a\\\nb\n"""\nc\n\nd\n"""\n"""e"""\n/exit\nnever\n')
    questions = [asked[-1]["content"] for asked, _ in models[0].asked]
    assert questions == ["a\nb", "c\n\nd", "e"]


def test_chat_commands(run: Run, models: list[FakeLLM], tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    script = (
        f"one\n/reset\n/system be brief\ntwo\n/save {file}\n/save\n/help\n/nonsense\n/system\n3\n"
    )
    code, out, err = run("chat", "m", stdin=script)
    assert (code, out) == (0, "ONE \nTWO \n3 \n")
    assert json.loads(file.read_text()) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "TWO "},
    ]
    assert models[0].asked[2][0][0]["role"] == "user"
    for words in (f"saved to {file}", "give a file", "/reset", "there is no /nonsense"):
        assert words in err


def test_chat_save_that_fails_goes_on(run: Run, models: list[FakeLLM]) -> None:
    code, out, err = run("chat", "m", stdin="/save /nowhere/at/all\nhi\n")
    assert (code, out) == (0, "HI \n")
    assert "cannot write /nowhere/at/all: No such file" in err


def test_chat_drops_the_oldest_turns_with_a_notice(run: Run, models: list[FakeLLM]) -> None:
    code, out, err = run("chat", "m", stdin="a\nb\nc\nd\n")
    assert (code, out) == (0, "A \nB \nC \nD \n")
    assert err.count("the oldest 1 turns were dropped") == 1
    last = [message["content"] for message in models[0].asked[-1][0]]
    assert last == ["b", "B ", "c", "C ", "d"]


class Refusing:
    """A talker that refuses everything as too long."""

    name = "refusing"

    def answer(self, messages: object, params: object) -> Iterator[Piece]:
        raise InvalidRequestError("too long", code="context_length_exceeded")
        yield Piece("")

    def close(self) -> None:
        pass


def test_chat_a_question_too_long_by_itself_is_an_error() -> None:
    conversation = Conversation(turns=[("a", "b"), ("c", "d")])
    with pytest.raises(InvalidRequestError, match="too long"):
        chat_module._ask(Refusing(), conversation, "q", _GREEDY)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_chat_ctrl_c_stops_the_answer_not_the_program(
    models: list[FakeLLM], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeLLM.settings["interrupt"] = True  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "argv", ["shoal", "chat", "m"])
    monkeypatch.setattr(sys, "stdin", Terminal("one two three\nfour five\n"))
    with pytest.raises(SystemExit) as left:
        main()
    told = capsys.readouterr()
    assert left.value.code in (0, None)
    assert "ONE \n" in told.out
    assert "FOUR \n" in told.out
    assert "THREE" not in told.out
    assert told.err.count("interrupted") == 2
    assert models[0].cancelled == 2


def test_chat_ctrl_c_down_a_pipe_leaves(run: Run, models: list[FakeLLM]) -> None:
    FakeLLM.settings["interrupt"] = True  # type: ignore[attr-defined]
    code, _, _ = run("chat", "m", stdin="one two\nthree\n")
    assert code == 130
    assert models[0].closed


def test_a_model_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[31mb\x07\x9b\r\n\tü") == "a[31mb\n\tü"


# --- chat with a server ---


def sse(*events: object) -> bytes:
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    return "".join([": ping\n\n", *lines, "data: [DONE]\n\n"]).encode()


def delta(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}, "finish_reason": finish}]}


def talker(handler: Callable[[httpx.Request], httpx.Response], **more: Any) -> RemoteTalker:
    return RemoteTalker("http://host:8000/v1/", transport=httpx.MockTransport(handler), **more)


ANSWER = sse(delta("Hel"), delta("lo", "stop"), {"choices": [], "usage": {"completion_tokens": 2}})


def test_remote_chat_streams() -> None:
    asked: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "served"}]})
        return httpx.Response(200, content=ANSWER)

    remote = talker(handler, api_key="k")
    messages = [{"role": "user", "content": "hi"}]
    params = SamplingParams(temperature=0.5, max_tokens=9, stop=("x",), top_k=4)
    pieces = list(remote.answer(messages, params))
    remote.close()
    assert "".join(piece.text for piece in pieces) == "Hello"
    assert sum(piece.num_tokens for piece in pieces) == 2
    assert [piece.finish_reason for piece in pieces] == [None, "stop", None]
    assert [str(request.url) for request in asked] == [
        "http://host:8000/v1/models",
        "http://host:8000/v1/chat/completions",
    ]
    assert {request.headers["authorization"] for request in asked} == {"Bearer k"}
    assert json.loads(asked[1].content) == {
        "model": "served",
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
        "top_p": 1.0,
        "max_tokens": 9,
        "top_k": 4,
        "stop": ["x"],
    }


@pytest.mark.parametrize(
    ("response", "kind", "words"),
    [
        (httpx.Response(401), RequestError, "pass --api-key"),
        (httpx.Response(502, text="<html>"), RequestError, "answered 502"),
        (
            httpx.Response(400, json={"error": {"message": "m", "code": "c"}}),
            InvalidRequestError,
            "^m$",
        ),
        (
            httpx.Response(200, content=sse(delta("a"), {"error": {"message": "died"}})),
            RequestError,
            "died",
        ),
        (httpx.Response(200, content=sse(delta("a"))), UnavailableError, "in the middle"),
    ],
)
def test_remote_chat_refusals(
    response: httpx.Response, kind: type[RequestError], words: str
) -> None:
    remote = talker(lambda _: response, model="m")
    with pytest.raises(kind, match=words):
        list(remote.answer([], _GREEDY))
    remote.close()


def test_remote_chat_overflow_keeps_its_code() -> None:
    body = {"error": {"message": "m", "code": "context_length_exceeded"}}
    remote = talker(lambda _: httpx.Response(400, json=body), model="m")
    with pytest.raises(InvalidRequestError) as caught:
        list(remote.answer([], _GREEDY))
    assert caught.value.code == "context_length_exceeded"
    remote.close()


def test_remote_chat_without_a_server(run: Run) -> None:
    code, out, err = run("chat", "--url", "http://127.0.0.1:9", stdin="hi\n")
    assert (code, out) == (1, "")
    assert re.fullmatch(r"error: no server answers at http://127\.0\.0\.1:9 .*shoal serve.*\n", err)


def test_remote_chat_with_something_else() -> None:
    with pytest.raises(UnavailableError, match="does not list its models"):
        talker(lambda _: httpx.Response(200, text="hello"))


# --- models ---


def test_models_lists_pulls_and_removes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run("models")
    assert code == 0
    assert "no models are cached yet" in out
    assert "ready to pull: smollm2-135m" in out
    assert json.loads(run("models", "--json")[1]) == []

    path = tmp_path / "cache" / "models" / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x" * 1500)
    assert re.search(rf"smollm2-135m +1\.5 KB +catalogue +{path}", run("models")[1])
    assert json.loads(run("models", "--json")[1]) == [
        {
            "name": "smollm2-135m",
            "path": str(path),
            "size_bytes": 1500,
            "source": "catalogue",
        }
    ]

    code, out, _ = run("models", "remove", "smollm2-135m", stdin="n\n")
    assert code != 0
    assert path.exists()
    code, out, _ = run("models", "remove", "smollm2-135m", "--yes")
    assert (code, out) == (0, "smollm2-135m removed, 1.5 KB freed\n")
    assert not path.exists()
    code, _, err = run("models", "remove", "smollm2-135m", "--yes")
    assert (code, err) == (1, "error: smollm2-135m is not cached; `shoal models` lists what is\n")


def test_models_pull(run: Run, models: list[FakeLLM]) -> None:
    assert run("models", "pull", "org/name") == (0, "/models/org/name\n", "")
