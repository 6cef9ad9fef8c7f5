"""Templates of others: what they may do, and what they are refused for, soon and in few bytes."""

import random
import time

import pytest

from t5x_lite.data import prompts, templates
from t5x_lite.errors import UserError


def render(source: str, **values) -> str:
    return templates.render(source, values, random.Random(0), "the template")


def test_what_prompts_do():
    assert render('{{ question | capitalize }}? {% for a in answer %}{{ loop.index }}. {{ a }}\n'
                  '{% endfor %}{{ ["x", "y"][label] }} {{ answer | join(", ") }}',
                  question="who", answer=["Ada", "Bob"], label=1) == (
        "Who? 1. Ada\n2. Bob\ny Ada, Bob")
    assert render('{% set ns = namespace(n=0) %}{% for i in range(4) %}{% set ns.n = ns.n + i %}'
                  '{% endfor %}{{ ns.n ~ "!" }} {{ "a-b".replace("-", " ") }} {{ "%s" | format(3) }}'
                  ' {{ "{}".format("x") }} {{ "é" * 3 }} {{ [1, 1, 2] | most_frequent }}') == (
        "6! a b 3 x ééé [1]")
    assert render("{{ [3, 4] | choice }}") in ("3", "4")
    assert len(render("{{ text }}", text="word " * 100_000)) == 500_000


@pytest.mark.parametrize("source", [
    "{{ ''.__class__.__mro__ }}", "{{ x.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('echo owned').read() }}",
    "{{ lipsum.__globals__ }}", "{% set _ = items.append(1) %}", "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}", "{{ ''|attr('format')|attr('__self__') }}{{ x() }}", "{{", "{{ 1/0 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ '\\ud83d' }} ||| x",
    "{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "{% if 1 %}" * 150 + "{% endif %}" * 150])
def test_what_a_template_must_not_do(source):
    with pytest.raises(UserError, match="^the template "):
        assert "owned" not in render(source, items=[], x=render)


GROWS = "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}%s{% endfor %}"


@pytest.mark.parametrize("source", [
    "{{ 'x' * 1000000000000 }}", "{{ 1000000000000 * 'x' }}", "{{ [0] * 1000000000000 }}",
    "{{ 9 ** (9 ** 9) }}", "{{ range(1000000000000) | list }}", "{{ range(10**9)|sum }}",
    "{% for i in range(1000000) %}{% for j in range(1000000) %}{% endfor %}{% endfor %}",
    "{% for i in range(1000000) %}{{ 'a long text of a template' }}{% endfor %}",
    "{% set y %}{% for i in range(1000000) %}some text of the template itself{% endfor %}{% endset %}",
    "{{ 'x' | center(1000000000000) }}", "{{ 'x'.center(1000000000000) }}",
    "{{ 'x'.zfill(1000000000000) }}", "{{ '%1000000000000d' % 3 }}",
    "{{ '%1000000000000d' | format(3) }}", "{{ '{:>1000000000000}'.format(3) }}",
    "{{ '%*d' % (1000000000, 3) }}", "{{ '{:>{w}}'.format(3, w=10**10) }}",
    "{{ ['x' * 1000000] * 1000000 | join }}", "{{ (['x' * 1000] * 1000) | join('y' * 1000) }}",
    "{{ ('x' * 100000).replace('x', 'y' * 100000) }}", "{{ ('x' * 100000) | replace('x', 'y' * 99999)"
    " }}", "{{ ('\n' * 100000) | indent(100000) }}", "{{ 'x'.expandtabs(10**12) * 3 * 10**7 }}",
    GROWS.replace("%s", "{% set ns.x = ns.x ~ ns.x %}"),
    GROWS.replace("%s", "{% set ns.x = ns.x + ns.x %}"),
    GROWS.replace("%s", "{% set ns.x = [ns.x, ns.x] %}") + "{{ ns.x }}",
    GROWS.replace("%s", "{% set ns.x = [ns.x, ns.x] %}") + "{{ ns.x | string | length }}",
    "{% set x = 'a' * 9 %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "{{ lipsum(n=100000000) }}", "x" * 3_000_000,
])
def test_what_is_too_much_is_refused_soon(source):
    began = time.process_time()
    with pytest.raises(UserError, match="^the template "):
        render(source)
    assert time.process_time() - began < templates.MAX_SECONDS + 5


@pytest.mark.parametrize("content, says", [
    ("a: &a [x, x]\nb: &b [*a, *a]\ntemplates: *b\n", "it holds a reference"),
    ("templates: 3\n", "no 'templates' that is an object"), ("[" * 5000, "is no YAML"),
    ("templates:\n  a: !Template {name: n, metadata: {}}\n", "template a has no 'jinja'"),
    ("templates: !!python/object/apply:os.system ['true']\n", "templates"), ("\0", "NUL byte"),
    ("", "is not an object"),
])
def test_template_files_that_are_none(content, says, tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=says):
        prompts.read_templates(str(path))


def test_a_shell_command_is_not_run(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text("templates:\n  a: !Template\n    name: a\n    answer_choices: null\n    jinja: '{{ "
                    "cycler.__init__.__globals__.os.popen(\"touch owned\").read() }} ||| x'\n"
                    "    metadata: !TemplateMetadata {original_task: true}\n")
    [template] = prompts.read_templates(str(path))
    with pytest.raises(UserError, match="the template 'a' does what a template must not"):
        prompts.render(template, {"question": "who"})
