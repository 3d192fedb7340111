"""Tests of the documentation: the site, links, and the page of metrics."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from pymdownx.slugs import slugify

import impala
from configs import config

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = ROOT / 'docs'
# Keys on docs/metrics.md that the run below does not have.
OF_OTHER_RUNS = {
    'level_frames/LEVEL', 'level_frames_per_second/LEVEL',
    'test_return/LEVEL', 'test/frames', 'test/agent_steps', 'test/wall_seconds',
    'loss/NAME', 'loss/autoencoder', 'intrinsic_reward',
    'SUITE/training_no_cap', 'SUITE/training_cap_100',
    'SUITE/training_median_no_cap', 'SUITE/training_median_cap_100',
    'SUITE/test_no_cap', 'SUITE/test_cap_100',
    'SUITE/test_median_no_cap', 'SUITE/test_median_cap_100',
    'replay_unrolls_left_out', 'replay_jobs', 'replay_unrolls_lost',
    'stage_seconds/learner/intrinsic_reward',
    'stage_seconds/replay/send', 'stage_seconds/replay/fetch',
    'level_cache/hits', 'level_cache/misses', 'level_cache/seconds_saved',
    'task', 'host', 'level', 'environments', 'trajectories_per_second', 'policy_lag',
    'seconds_since_seen', 'rejected', 'duplicates',
}  # fmt: skip


def build(folder, site):
    return subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--strict', f'--site-dir={site}'],
        cwd=folder,
        env=os.environ | {'NO_MKDOCS_2_WARNING': '1'},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """The site, built from the present pages."""
    folder = tmp_path_factory.mktemp('site')
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_has_every_page(site):
    for page in DOCS.rglob('*.md'):
        name = 'index' if page.stem == 'README' else page.stem
        assert (site / page.relative_to(DOCS).with_name(f'{name}.html')).exists(), page


def test_pages_load_nothing_from_other_servers(site):
    for page in site.rglob('*.html'):
        loaded = re.findall(r'<(?:script|link|img|iframe)\b[^>]*>', page.read_text())
        elsewhere = [
            tag
            for tag in loaded
            if re.search(r'(?:src|href)="?(?:https?:)?//', tag) and 'rel="canonical"' not in tag
        ]
        assert not elsewhere, page


def test_public_names_have_their_docstrings(site):
    page = (site / 'api' / 'impala.html').read_text()
    for name in set(impala.__all__) - {'Agent', 'Learner'}:
        assert re.search(rf'id="impala\.[\w.]*{name}"', page), name
    assert 'Trains until all frames are done' in page
    own = (site / 'api' / 'own_parts.html').read_text()
    for name in ('agent.Agent', 'learner.Learner', 'torsos.Torso', 'core.Core', 'losses.Loss'):
        assert re.search(rf'id="impala\.\w+\.{name}"', own), name
    assert 'id="vtrace.from_logits"' in (site / 'api' / 'vtrace.html').read_text()


def test_links_to_files_outside_of_the_pages_lead_to_copies(site):
    page = (site / 'examples' / 'own_hook.html').read_text()
    assert 'href="../project/examples/own_hook.py"' in page
    copy = site / 'project' / 'examples' / 'own_hook.py'
    assert copy.read_bytes() == (ROOT / 'examples' / 'own_hook.py').read_bytes()


@pytest.mark.parametrize(
    'link, warning',
    [
        ('[code](../code.py)', None),
        ('[code](../gone.py)', "'index.md' links to '[code](../gone.py)', which does not exist."),
        ('[page](gone.md)', "'gone.md'"),
        ('[page](#gone)', "'#gone'"),
    ],
)
def test_a_link_to_nothing_is_not_built(tmp_path, link, warning):
    docs = tmp_path / 'docs'
    docs.mkdir()
    shutil.copy(DOCS / 'outside_links.py', docs)
    (tmp_path / 'code.py').write_text('1')
    (docs / 'index.md').write_text(f'# Page\n\n{link}\n')
    (tmp_path / 'mkdocs.yml').write_text(
        'site_name: test\nhooks: [docs/outside_links.py]\nexclude_docs: /outside_links.py\n'
        'validation: {links: {not_found: warn, anchors: warn}}\n'
    )
    done = build(tmp_path, tmp_path / 'site')
    assert (done.returncode == 0) == (warning is None), done.stderr
    assert warning is None or warning in done.stderr


@pytest.mark.parametrize('name', ['README.md', 'CONTRIBUTING.md', 'CHANGELOG.md'])
def test_links_of_the_pages_at_the_top_lead_somewhere(name):
    links = re.findall(r'\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)', (ROOT / name).read_text())
    for target, anchor in links:
        path = ROOT / (target or name)
        assert path.exists(), target
        if anchor:
            headings = re.findall(r'^#+ (.*)$', path.read_text(), re.MULTILINE)
            assert anchor in [slugify(case='lower')(each, '-') for each in headings], target


def documented_keys():
    return re.findall(r'^\| `([^`]+)` \|', (DOCS / 'metrics.md').read_text(), re.MULTILINE)


def keys_of(logdir):
    lines = [json.loads(line) for line in (logdir / 'metrics.jsonl').read_text().splitlines()]
    return {key for line in lines for key in line}


def test_every_metric_is_documented(tmp_path):
    impala.train(
        config(
            tmp_path, level_name='CartPole-v1', total_environment_frames=400, loss='appo',
            sample_reuse=2, replay_capacity=20, replay_fraction=0.5, popart=True,
            reward_clipping='none', final_entropy_cost=0.0,
        )
    )  # fmt: skip
    keys = keys_of(tmp_path)
    documented = documented_keys()
    assert len(set(documented)) == len(documented)
    patterns = {
        key: re.compile(re.escape(key).replace('LEVEL', '.+').replace('SUITE', '.+') + '$')
        for key in documented
        if key != 'loss/NAME'
    }
    assert [key for key in keys if not any(each.match(key) for each in patterns.values())] == []
    seen = {name for name, each in patterns.items() if any(each.match(key) for key in keys)}
    assert {*documented} - seen == OF_OTHER_RUNS
