"""The site that `make docs` builds: every page and every public name is there, and no link or reference is dead."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import hfac

ROOT = Path(__file__).parents[2]
SITE = ROOT / "docs" / "site"


def test_the_api_page_has_every_public_name():
    text = (SITE / "api.rst").read_text()
    asked = re.findall(r"auto(?:class|function|module):: (\S+)", text)
    assert {f"hfac.{name}" for name in hfac.__all__ if name != "__version__"} <= set(asked)
    assert {"hfac.optim.base.FactoredOptimizer", "hfac.release.ReleasedGradients"} <= set(asked)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Where the site has been built, as `make docs` does it."""
    pytest.importorskip("furo", reason="the extra docs builds it")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-n", "-W", "--keep-going", "-b", "html", "-c", SITE, ROOT, out]
    built = subprocess.run([*command, "-d", out / ".doctrees"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return out


@pytest.mark.slow
def test_the_site_has_every_page_and_what_each_name_takes_and_raises(site):
    first = (site / "index.html").read_text()
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert pages <= set(re.findall(r'href="docs/([\w-]+)\.html"', first))
    api = (site / "docs" / "site" / "api.html").read_text()
    public = [name for name in hfac.__all__ if name not in ("__version__", "functional")]
    for name in (*public, "functional.hfac", "functional.smmf"):
        start = api.index(f'id="hfac.{name}"')
        entry = api[start : api.find('id="hfac.', start + 1)]
        assert "Raises" in entry, name
        assert "default" in entry or name.startswith("functional"), name
    options = re.findall(r"<strong>(\w+)</strong>: ", api[api.index('id="hfac.HFac"') : api.index('id="hfac.SMMF"')])
    assert {"params", "lr", "betas", "eps", "first_moment", "backend", "watch"} <= set(options)


@pytest.mark.slow
def test_links_of_the_site_lead_somewhere(site):
    """Sphinx checks links between pages; this also those to files, pictures and places within a page. Pages of source
    text and of the index are Sphinx's own."""
    dead = []
    for page in {*site.glob("*.html"), *site.glob("docs/**/*.html")} - {site / "genindex.html", site / "search.html"}:
        text = page.read_text()
        for link in re.findall(r'(?:href|src)="([^":]*)"', text):
            path, _, anchor = link.partition("#")
            target = (page.parent / path.split("?")[0]).resolve() if path else page
            there = target.exists() and (
                not anchor or target.suffix != ".html" or f'id="{anchor}"' in target.read_text()
            )
            if not there:
                dead.append((page.name, link))
    assert dead == []


@pytest.mark.slow
def test_links_to_folders_become_their_names_once(site):
    """A site has no folders to show. Pages once read "bench/resultsbench/results/"."""
    folder = r'<span class="pre">[\w/]+/</span></code>'
    pages = [page.read_text() for page in site.glob("docs/*.html")]
    assert sum(bool(re.search(folder, text)) for text in pages) > 3
    assert [found for text in pages for found in re.findall(rf"\w(?:</\w+>)*<code[^>]*>{folder}", text)] == []
