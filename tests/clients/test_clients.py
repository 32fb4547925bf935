"""Programs of others that talk to an OpenAI server, each in a venv of its own, each doing what its users do first.

Their answers are held against those of a plain HTTP request, and lm-eval's log-likelihoods against transformers. `make
test-clients` makes the venvs and runs this; nothing here reaches beyond the machine.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.cluster import RunningCluster, launched
from support.tiny_models import make_tiny_model

pytestmark = [pytest.mark.clients, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
MESSAGES = [{"role": "user", "content": "tell me of the word that they had for it"}]
TASKS = [
    {"question": "what is the word", "choices": ["that", "his", "some"], "answer": 1},
    {"question": "who had it", "choices": ["they", "we", "the"], "answer": 0},
    {"question": "they were on it", "choices": ["and", "from", "as"], "answer": 2},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clients")


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Path:
    return make_tiny_model(folder / "tiny", seed=4)


@pytest.fixture(scope="module")
def cluster(folder: Path, tiny: Path) -> Iterator[RunningCluster]:
    with launched(folder, model_path=tiny, name="clients") as running:
        yield running


@pytest.fixture(scope="module")
def base_url(cluster: RunningCluster) -> str:
    return f"{cluster.base_url}/v1"


def asked(base_url: str, messages: list[dict[str, str]], **fields: Any) -> str:
    """The oracle: the same request without any client."""
    body = {"model": "tiny", "messages": messages, "max_tokens": 12, "temperature": 0, **fields}
    answer = httpx.post(f"{base_url}/chat/completions", json=body, trust_env=False, timeout=60)
    content: str = answer.raise_for_status().json()["choices"][0]["message"]["content"]
    return content


def run(venv: str, program: str, *arguments: str, folder: Path, **environment: str) -> str:
    """What a program of one of the venvs prints."""
    found = subprocess.run(
        [ROOT / f".venv-{venv}" / "bin" / program, *arguments],
        cwd=folder,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "OPENAI_API_KEY": "unused",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert found.returncode == 0, (found.stdout + found.stderr)[-4000:]
    return found.stdout


def script(name: str, base_url: str, folder: Path) -> dict[str, Any]:
    printed = run("clients", "python", str(SCRIPTS / name), base_url, "tiny", folder=folder)
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def test_openai_python(base_url: str, folder: Path) -> None:
    found = script("openai_client.py", base_url, folder)
    assert found["models"] == ["tiny"]
    assert found["whole"] == found["streamed"] == asked(base_url, MESSAGES)
    assert found["completion_tokens"] == [12, 12]
    assert found["kinds"] == ["chunk", "content.delta", "content.done"]
    assert (found["refused"], found["bad"]) == ("model", "temperature")


def test_langchain_openai(base_url: str, folder: Path) -> None:
    found = script("langchain_client.py", base_url, folder)
    expected = asked(base_url, [{"role": "system", "content": "be brief"}, *MESSAGES])
    assert [found["whole"], found["streamed"], *found["batch"]] == [expected] * 4
    assert found["stopped"] == expected[: expected.index(found["stop"])]
    assert found["finish_reason"] == "length"
    assert found["usage"] == [12, 12]


def test_litellm(base_url: str, folder: Path) -> None:
    found = script("litellm_client.py", base_url, folder)
    expected = asked(base_url, MESSAGES)
    assert found["answers"] == {"openai": [expected, expected], "hosted_vllm": [expected, expected]}
    assert found["refused"] == 400
    assert found["text_tokens"] == 6


def test_llm(base_url: str, folder: Path) -> None:
    (folder / "llm").mkdir()
    models = [{"model_id": "here", "model_name": "tiny", "api_base": base_url}]
    (folder / "llm" / "extra-openai-models.yaml").write_text(yaml.safe_dump(models))
    expected = asked(base_url, [{"role": "system", "content": "be brief"}, *MESSAGES])

    def llm(*arguments: str) -> str:
        options = ("-o", "max_tokens", "12", "-o", "temperature", "0")
        return run("clients", "llm", *arguments, *options, folder=folder, LLM_USER_PATH=str(folder / "llm"))

    prompt = ("-m", "here", "-s", "be brief", MESSAGES[0]["content"])
    assert llm(*prompt, "--no-stream").rstrip("\n") == expected.rstrip("\n")
    assert llm(*prompt).rstrip("\n") == expected.rstrip("\n")
    assert llm("-c", "and then"), "a conversation goes on"


def test_lm_eval(base_url: str, folder: Path, tiny: Path) -> None:
    """A multiple-choice task by log-likelihoods and a generation, both through the completions route."""
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "data.jsonl").write_text("".join(json.dumps(task) + "\n" for task in TASKS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tasks / "data.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choice = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
    generate = {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
    }
    (tasks / "choice.yaml").write_text(
        yaml.safe_dump({**common, **choice, "task": "tiny_choice", "metric_list": [{"metric": "acc"}]})
    )
    (tasks / "generate.yaml").write_text(
        yaml.safe_dump({**common, **generate, "task": "tiny_generate", "metric_list": [{"metric": "exact_match"}]})
    )
    model = f"model=tiny,base_url={base_url}/completions,tokenizer_backend=remote,tokenized_requests=True"
    run(
        "clients",
        "lm-eval",
        *("run", "--model", "local-completions", "--model_args", model, "--tasks", "tiny_choice,tiny_generate"),
        *("--include_path", str(tasks), "--output_path", str(folder / "lm-eval"), "--log_samples", "--batch_size", "2"),
        folder=folder,
    )
    (choices,) = folder.glob("lm-eval/**/samples_tiny_choice_*.jsonl")
    samples = [json.loads(line) for line in choices.read_text().splitlines()]
    assert len(samples) == len(TASKS)
    tokenizer, oracle = AutoTokenizer.from_pretrained(tiny), AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    for sample in samples:
        for index, ((loglikelihood, greedy),) in enumerate(sample["resps"]):
            question, answer = sample["doc"]["question"], f" {sample['doc']['choices'][index]}"
            expected, best = _loglikelihood(oracle, tokenizer, question, answer)
            assert float(loglikelihood) == pytest.approx(expected, abs=1e-3)
            assert str(greedy) == str(best)
    (generated,) = folder.glob("lm-eval/**/samples_tiny_generate_*.jsonl")
    assert len(generated.read_text().splitlines()) == len(TASKS)


def _loglikelihood(oracle: Any, tokenizer: Any, question: str, answer: str) -> tuple[float, bool]:
    whole = tokenizer(question + answer, add_special_tokens=False)["input_ids"]
    start = len(tokenizer(question, add_special_tokens=False)["input_ids"])
    with torch.inference_mode():
        logprobs = oracle(torch.tensor([whole])).logits[0].log_softmax(-1)
    rows = logprobs[start - 1 : len(whole) - 1]
    targets = torch.tensor(whole[start:])
    return float(rows.gather(1, targets[:, None]).sum()), bool((rows.argmax(-1) == targets).all())


def test_guidellm(base_url: str, folder: Path, tiny: Path) -> None:
    report = folder / "guidellm.json"
    run(
        "guidellm",
        "guidellm",
        *("run", "--backend", f"kind=openai_http,target={base_url.removesuffix('/v1')},model=tiny"),
        *("--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=6"),
        *("--tokenizer", f"kind=huggingface_auto,model={tiny}"),
        *("--data", "kind=synthetic_text,prompt_tokens=40,output_tokens=8"),
        *("--output", f"kind=json,path={report}", "--disable-console"),
        folder=folder,
    )
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (6, 0)
    assert benchmark["metrics"]["output_token_count"]["successful"]["mean"] == 8
