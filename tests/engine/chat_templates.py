"""Templates made of the constructs that published ones consist of.

Each entry: the template (or several by name), and what tokenizer_config.json says of
the special tokens.
"""

from tests.engine.tool_templates import (
    LLAMA_3_2,
    MISTRAL_3,
    QWEN_2_5,
    QWEN_3,
    SMOLLM_3,
)

BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"
START, END, TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
NAMED = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNK, "pad_token": PAD}
CHAT = {"bos_token": None, "eos_token": END, "pad_token": TEXT, "unk_token": None}

# A system message is put into the first question; roles must alternate.
LLAMA_2 = """\
{% if messages[0]['role'] == 'system' %}\
{% set rest = messages[1:] %}{% set first = messages[0]['content'] %}\
{% else %}{% set rest = messages %}{% set first = false %}{% endif %}\
{% for m in rest %}\
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Roles must alternate: user, assistant, user, ...') }}{% endif %}\
{% if loop.index0 == 0 and first != false %}\
{% set text = '<<SYS>>\\n' + first + '\\n<</SYS>>\\n\\n' + m['content'] %}\
{% else %}{% set text = m['content'] %}{% endif %}\
{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}\
{% elif m['role'] == 'assistant' %}{{ ' ' + text.strip() + ' ' + eos_token }}\
{% endif %}\
{% endfor %}"""

LLAMA_3 = """\
{% set loop_messages = messages %}\
{% for message in loop_messages %}\
{% set content = '<|head|>' + message['role'] + '<|/head|>\\n\\n' \
+ message['content'] | trim + '<|eot|>' %}\
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}\
{{ content }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\\n\\n' }}{% endif %}"""

MISTRAL_1 = """\
{{ bos_token }}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}\
{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}\
{% endif %}{% endfor %}"""

# Dates of today and yesterday; contents that are lists of parts.
MISTRAL_SMALL = """\
{%- set today = strftime_now("%Y-%m-%d") %}
{%- set default_system_message = "The current date is " + today + "." %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- if messages[0]['content'] is string %}
        {%- set system_message = messages[0]['content'] %}
    {%- else %}
        {%- set system_message = messages[0]['content'][0]['text'] %}
    {%- endif %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = default_system_message %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {%- if message['content'] is string %}
            {{- '[INST]' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST]' }}
            {%- for block in message['content'] %}
                {%- if block['type'] == 'text' %}
                    {{- block['text'] }}
                {%- elif block['type'] in ['image', 'image_url'] %}
                    {{- '[IMG]' }}
                {%- else %}
                    {{- raise_exception('Only text and image blocks are supported!') }}
                {%- endif %}
            {%- endfor %}
            {{- '[/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' and message['content'] is string %}
        {{- message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('Only user, system and assistant roles: ' \
~ message['role']) }}
    {%- endif %}
{%- endfor %}"""

SMOLLM_2 = """\
{% for message in messages %}\
{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\\nYou are a helpful AI assistant<|im_end|>\\n' }}{% endif %}\
{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n'}}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

CHATML = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}\
{% endif %}{% for message in messages %}{{ bos_token + '<|im_start|>' \
+ message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}\
{{ pad_token }}{{ unk_token }}{{ cls_token is defined }}{{ documents is none }}"""

GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}\
{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""

# Everything is kept in a namespace; thoughts are dropped.
DEEPSEEK_R1 = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}\
{% endif %}{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, \
system_prompt='') %}\
{%- for message in messages %}{%- if message['role'] == 'system' %}\
{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}\
{{bos_token}}{{ns.system_prompt}}\
{%- for message in messages %}\
{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}\
{{'<｜User｜>' + message['content']}}{%- endif %}\
{%- if message['role'] == 'assistant' and message['content'] is not defined %}\
{%- set ns.is_tool = false -%}{%- for tool in message['tool_calls']%}\
{%- if not ns.is_first %}{{'<｜Assistant｜><｜call｜>' + tool['type'] + '\\n' \
+ tool['function']['name'] + '\\n```json\\n' + tool['function']['arguments'] | tojson \
+ '\\n```'}}{%- set ns.is_first = true -%}{%- endif %}{%- endfor %}{%- endif %}\
{%- if message['role'] == 'assistant' and message['content'] is defined %}\
{% set content = message['content'] %}{% if '</think>' in content %}\
{% set content = content.split('</think>')[-1] %}{% endif %}\
{{'<｜Assistant｜>' + content + eos_token}}{%- endif %}\
{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}\
{{'<｜out｜>' + message['content']}}{%- endif %}{%- endfor -%}\
{% if add_generation_prompt and not ns.is_tool %}\
{{'<｜Assistant｜><think>\\n'}}{% endif %}"""

BY_NAME = [
    {"name": "default", "template": SMOLLM_2},
    {"name": "tool_use", "template": QWEN_2_5},
    {"name": "rag", "template": "{{ documents | tojson }}"},
]

TEMPLATES = {
    "LLaMA-2": (LLAMA_2, NAMED),
    "LLaMA-3": (LLAMA_3, {"bos_token": "<|begin|>", "eos_token": "<|eot|>"}),
    "LLaMA-3.2": (LLAMA_3_2, {"bos_token": "<|begin|>", "eos_token": "<|eot|>"}),
    "Qwen2.5": (QWEN_2_5, CHAT),
    "Qwen3": (QWEN_3, CHAT),
    "Mistral v0.1": (MISTRAL_1, NAMED),
    "Mistral v3": (MISTRAL_3, NAMED),
    "Mistral Small": (MISTRAL_SMALL, NAMED),
    "SmolLM2": (SMOLLM_2, {**CHAT, "bos_token": START}),
    "SmolLM3": (SMOLLM_3, CHAT),
    "Zephyr": (ZEPHYR, NAMED),
    "ChatML": (CHATML, {**NAMED, "image_token": "<image>"}),
    "Gemma": (GEMMA, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": PAD}),
    "DeepSeek-R1-Qwen": (DEEPSEEK_R1, {"bos_token": "<｜begin｜>", "eos_token": EOS}),
    "several": (BY_NAME, CHAT),
}
