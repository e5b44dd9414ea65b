"""What the README and the pages of docs/ say is so: examples run, commands exist, links lead somewhere."""

import re
from pathlib import Path

import pytest
import tables
from pages import between

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {
    path.relative_to(ROOT): path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
each_page = pytest.mark.parametrize("page", PAGES, ids=str)


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PRINTED = [r"[1-9]\d* of \d+ entries protected\n", r"(\d.\w+ [1-9]\d* of \d+ entries trained\n)+"]


@pytest.mark.parametrize(("code", "printed"), list(zip(EXAMPLES, PRINTED, strict=True)))
def test_the_examples_run_as_printed(code: str, printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(code.strip().splitlines()) <= 18
    exec(compile(code, "README.md", "exec"), {})
    assert re.fullmatch(printed, capsys.readouterr().out, re.DOTALL)


@each_page
def test_every_make_target_it_names_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)`", PAGES[page]))
    assert named <= targets


def test_the_two_commands_are_there() -> None:
    assert {"demo", "test"} <= set(re.findall(r"^make ([a-z]+)", README, re.MULTILINE))


@each_page
def test_every_file_it_links_to_exists(page: Path) -> None:
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]+)?\)", PAGES[page]):
        target = (ROOT / page).parent / link if link else ROOT / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in {
                "#" + re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings
            }


def test_every_page_is_linked_to_from_the_readme() -> None:
    pages = {str(page) for page in PAGES} - {"README.md"}
    assert pages <= set(re.findall(r"\]\(([^)#]+)", README))


@each_page
def test_its_python_compiles(page: Path) -> None:
    for code in re.findall(r"```py(?:thon)?\n(.*?)```", PAGES[page], re.DOTALL):
        compile(code, str(page), "exec")


@pytest.mark.parametrize("page", tables.PAGES)
def test_the_tables_of_speed_are_those_of_the_committed_results(page: str) -> None:
    assert between(tables.MARKS, tables.PAGES[page]()) in (ROOT / page).read_text()


def test_every_option_of_the_commands_it_shows_exists() -> None:
    (command,) = re.findall(r"^python examples/finetune.py (.+)$", README, re.MULTILINE)
    source = (ROOT / "examples" / "finetune.py").read_text()
    for option in re.findall(r"(--[a-z-]+)", command):
        assert f'add("{option}"' in source
