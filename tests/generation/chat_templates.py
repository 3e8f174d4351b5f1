"""Templates made of the constructs that published ones consist of, and conversations.

Each entry: the template (or several by name), and what tokenizer_config.json says of
the special tokens.
"""

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

# The date, tools as JSON, whether names are defined, calls in messages.
LLAMA_3_2 = """\
{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|head|>system<|/head|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot|>" }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first = messages[0]['content'] | trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("Cannot put tools in the first user message!") }}
    {%- endif %}
    {{- '<|head|>user<|/head|>\\n\\n' -}}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
    {{- first + "<|eot|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' \
or 'tool_calls' in message) %}
        {{- '<|head|>' + message['role'] + '<|/head|>\\n\\n' \
+ message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only takes single calls at once!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|head|>assistant<|/head|>\\n\\n' -}}
        {{- '{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}" + "<|eot|>" }}
    {%- else %}
        {{- "<|head|>ipython<|/head|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|/head|>\\n\\n' }}
{%- endif %}
"""

QWEN_2_5 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are a helpful assistant.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) \
or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content \
+ '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
{{- bos_token is defined }}{{- bos_token }}"""

# A namespace, a loop from the end, thoughts that are cut out of the text.
QWEN_3 = """\
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string \
and not(message.content.startswith('<tool_response>') \
and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set thoughts = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\\n')\
.split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or (not loop.last and thoughts)) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thoughts.strip('\\n') \
+ '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}
                {{- '\\n' }}
            {%- endif %}
            {%- if tool_call.function %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {%- if tool_call.arguments is string %}
                {{- tool_call.arguments }}
            {%- else %}
                {{- tool_call.arguments | tojson }}
            {%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

MISTRAL_1 = """\
{{ bos_token }}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}\
{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}\
{% endif %}{% endfor %}"""

# Tools before the last question; ids of calls; a count kept in a namespace.
MISTRAL_3 = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" \
or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("roles must alternate, got " ~ message.role) }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] \
+ "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs must have a length of 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}
            {%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- elif message["role"] == "tool_results" or message["role"] == "tool" %}
        {%- if message.content is defined and message.content.content is defined %}
            {%- set content = message.content.content %}
        {%- else %}
            {%- set content = message.content %}
        {%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + "}[/TOOL_RESULTS]" }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
"""

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

# Blocks of what the model says, variables set within and behind them, the date, loop
# controls, macros.
SMOLLM_3 = """\
{#- a comment -#}
{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}
{%- macro heading(text) -%}
## {{ text }}
{% endmacro -%}
{%- set mode = "/think" if enable_thinking else "/no_think" -%}
{{- "<|im_start|>system\\n" -}}
{{ heading("Metadata") }}
{{- "Today Date: " -}}
{%- set today = strftime_now("%d %B %Y") -%}
{{- today ~ "\\nReasoning Mode: " + mode + "\\n\\n" -}}
{%- if xml_tools or python_tools or tools -%}
{{- heading("Tools") -}}
{%- for tool in (xml_tools or tools) -%}
{{- tool | string + "\\n" -}}
{%- endfor -%}
{%- endif -%}
{{- "<|im_end|>\\n" -}}
{%- set said = "nothing" -%}
{%- for message in messages -%}
    {%- set content = message.content if message.content is string else "" -%}
    {%- if message.role == "system" -%}{%- continue -%}{%- endif -%}
    {%- if message.role == "user" -%}
        {{ "<|im_start|>" + message.role + "\\n" + content + "<|im_end|>\\n" }}
    {%- elif message.role == "assistant" -%}
        {% generation %}
        {%- set said = content -%}
        {%- if mode == "/think" -%}
            {{ "<|im_start|>assistant\\n" + content.lstrip("\\n") + "<|im_end|>\\n" }}
        {%- else -%}
            {{ "<|im_start|>assistant\\n<think>\\n\\n</think>\\n" + said \
+ "<|im_end|>\\n" }}
        {%- endif -%}
        {% endgeneration %}
    {%- elif message.role == "tool" -%}
        {{ "<|im_start|>user\\n" + content + "<|im_end|>\\n" }}
    {%- else -%}
        {%- break -%}
    {%- endif -%}
    {{- said if loop.last -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {%- if mode == "/think" -%}
        {{ "<|im_start|>assistant\\n" }}
    {%- else -%}
        {{ "<|im_start|>assistant\\n<think>\\n\\n</think>\\n" }}
    {%- endif -%}
{%- endif -%}
"""

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


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def call(name, arguments, **more):
    function = {"name": name, "arguments": arguments}
    return {"type": "function", "function": function, **more}


ASKED = message("user", "  What is <b>2 & 2</b>?\n")
SYSTEM = message("system", "Answer in 日本語 – 'quoted' \"twice\" ✓")
CALLED = message(
    "assistant", "", tool_calls=[call("add", {"b": 2, "a": "ü<1>"}, id="abcdefghi")]
)
TWO_CALLS = {
    "role": "assistant",
    "content": None,
    "tool_calls": [call("add", {"b": 2, "a": [1.5, None, True]}, id="123456789")] * 2,
}
RESULT = message("tool", '{"sum": "4 & <more>"}', name="add")
THOUGHT = "<think>\nlet me see\n</think>\n\nIt is 4. 😀"
CONVERSATIONS = {
    "question": [ASKED],
    "system": [SYSTEM, ASKED],
    "several": [ASKED, message("assistant", THOUGHT), message("user", "नम Why?")],
    "all": [SYSTEM, ASKED, message("assistant", " 4 "), message("user", "")],
    "answered": [ASKED, message("assistant", "{{ bos_token }} 4")],
    "thoughts": [ASKED, message("assistant", "4", reasoning_content="two\ntwos")],
    "other thoughts": [ASKED, message("assistant", "4", reasoning="and 2")],
    "tool": [ASKED, CALLED, RESULT],
    "two calls": [ASKED, TWO_CALLS, RESULT, RESULT, message("assistant", "done")],
    "parts": [message("user", [{"type": "text", "text": "a <i>"}, {"type": "image"}])],
    "wrong order": [message("assistant", "first"), ASKED],
    "other role": [ASKED, message("critic", "no")],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": 'Adds "a" & <b> – größer',
            "parameters": {
                "type": "object",
                "properties": {"b": {"type": "number"}, "a": {"type": "string"}},
                "required": ["b", "a"],
            },
        },
    }
    for name in ("add", "subtract")
]
DOCUMENTS = [{"title": "Zoë's <notes>", "text": "b\na"}]
