import pytest

from hasten.errors import InvalidRequestError
from hasten.language.chat import render

MESSAGES = [{"role": "user", "content": "Hi"}]


def test_blocks_are_trimmed_as_transformers_does():
    template = "{% for m in messages %}\n    <{{ m.role }}>{{ m.content }}\n{% endfor %}\n{{ bos_token }}"
    assert render(template, MESSAGES, tokens={"bos_token": "B"}) == "    <user>Hi\nB"


def test_helpers():
    assert render("{{ messages | tojson }}", MESSAGES) == '[{"role": "user", "content": "Hi"}]'
    assert render("{{ strftime_now('%Y') }}", MESSAGES, strftime_now=lambda form: "2031") == "2031"
    assert render("{% for m in messages %}{% break %}{% endfor %}x", MESSAGES) == "x"


def test_the_template_may_refuse():
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ messages[3].content }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
    ],
)
def test_broken_and_hostile_templates_are_the_requests_fault(template):
    with pytest.raises(InvalidRequestError):
        render(template, MESSAGES)


def test_equal_to_transformers():
    transformers = pytest.importorskip("transformers")
    template = (
        "{%- if messages[0]['role'] == 'system' -%}<|s|>{{ messages[0]['content'] | trim }}\n{%- endif %}"
        "{% for m in messages if m.role != 'system' %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    messages = [{"role": "system", "content": " be brief "}, *MESSAGES, {"role": "assistant", "content": "Yo\n"}]
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template(
        conversations=[messages], chat_template=template, add_generation_prompt=True, eos_token="</s>"
    )
    assert render(template, messages, tokens={"eos_token": "</s>"}) == expected[0]
    assert transformers
