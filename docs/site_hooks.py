"""Hooks of the documentation's build: pages of results, which lie outside of docs/, become pages of the site."""

from pathlib import Path

from mkdocs.structure.files import File

RESULTS = "benchmarks/results"


def on_files(files, config):
    """Add every page of results to the site, as `results/NAME.md`."""
    root = Path(config.config_file_path).parent
    for page in sorted((root / RESULTS).glob("*.md")):
        files.append(File.generated(config, f"results/{page.name}", abs_src_path=str(page)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links between docs/ and the pages of results, as they lie in the repository, into links of the site."""
    return markdown.replace(f"](../{RESULTS}/", "](results/").replace("](../../docs/", "](../")
