"""The files around the package say what the code says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import yaml

from milan_pipe.config.params import Params, load_params

ROOT = Path(__file__).parents[2]


def test_params_file_is_the_recipe_of_the_scenes_written_out() -> None:
    written = yaml.safe_load((ROOT / "params.yaml").read_text())
    settings = load_params("scenes").model_dump(mode="json", exclude={"about", "clip"})
    assert written == settings, "a setting is missing from params.yaml, so `dvc exp run -S` cannot change it"


def test_settings_page_is_up_to_date() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "generate_settings.py"))["settings_page"]()
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == page, "run python docs/generate_settings.py"


def test_pipeline_reads_sections_that_exist() -> None:
    pipeline = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    for name, stage in pipeline["stages"].items():
        for key in stage.get("params", []):
            section, _, field = key.partition(".")
            assert section in Params.model_fields, f"stage {name} reads {key}"
            if field:
                assert field in type(getattr(Params(), section)).model_fields, f"stage {name} reads {key}"
        module = stage["cmd"].removeprefix("python -m ").replace(".", "/") + ".py"
        assert (ROOT / module).is_file()


def test_interrupted_extraction_survives_dvc() -> None:
    pipeline = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    (targets,) = pipeline["stages"]["extract-targets"]["outs"]
    assert targets["data/targets"] == {"persist": True, "cache": False}


def test_readme_begins_with_two_commands_of_one_line() -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert [block.count("\n") for block in blocks[:2]] == [1, 1]
    assert "dvc repro" in blocks[0]
    assert "pytest" in blocks[1]


def test_links_of_the_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
