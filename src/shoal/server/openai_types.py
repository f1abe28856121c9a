"""Request bodies: OpenAI's fields, vLLM's extras, and shoal's own.

Shape, types and sizes are checked here; ranges by `core.request.SamplingParams`; what
depends on the model (vocabulary, context) in `prompts.py` and `sampling.py`.

shoal's own fields: `output_token_ids` are output tokens a client already has. The request
continues right after them; they count in usage and towards max_tokens, and only the text of
new tokens is returned. With the same prompt, seed and parameters the whole is the same as
without the cut. `continuation`, as the model's card has it, names whose tokens they are: who says
another one is refused. A stream with `resumable` says in each event which tokens it holds, so that
it can be continued from there wherever it breaks.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from shoal.server.fields import (
    UNSUPPORTED_CHAT,
    UNSUPPORTED_COMPLETION,
    UNSUPPORTED_MESSAGE,
    UNSUPPORTED_PART,
    NoOps,
    without_no_ops,
)

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_LOGIT_BIAS = 1024

TokenIds = Annotated[list[int], Field(fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Label = Annotated[str, Field(max_length=512)]


def _kind(value: object) -> str:
    """Which branch of a union a value means, so that only that branch complains."""
    if not isinstance(value, list):
        return "str"
    first = value[0] if value else ""
    if isinstance(first, list):
        return "list[list]"
    return "list[int]" if isinstance(first, int) else "list"


Stop = Annotated[
    Annotated[StopString, Tag("str")]
    | Annotated[
        list[StopString],
        Field(max_length=MAX_STOP_STRINGS, fail_fast=True),
        Tag("list"),
    ],
    Discriminator(lambda value: "list" if isinstance(value, list) else "str"),
]

Prompt = Annotated[
    Annotated[str, Tag("str")]
    | Annotated[list[str], Field(fail_fast=True), Tag("list")]
    | Annotated[TokenIds, Tag("list[int]")]
    | Annotated[list[TokenIds], Field(fail_fast=True), Tag("list[list]")],
    Discriminator(_kind),
]


class WireModel(BaseModel):
    """A JSON object that tolerates no unknown field, and says which one it was."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=False)
    unsupported: ClassVar[NoOps] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        fields = {field.alias or name: field for name, field in cls.model_fields.items()}
        kept = without_no_ops(body, fields.keys(), cls.unsupported)
        # Null is OpenAI's «not set», whatever the field's type is.
        return {
            name: value
            for name, value in kept.items()
            if value is not None or fields[name].is_required()
        }


class StreamOptions(WireModel):
    """`continuous_usage_stats` (vLLM): usage so far in every chunk."""

    unsupported = {"include_obfuscation": (False,)}

    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchemaFormat(WireModel):
    name: Label
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(WireModel):
    """What the output must be; a schema is always enforced (as with strict=true)."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class GenerationFields(WireModel):
    """What chat and plain completions have in common."""

    model: Label | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Stop | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: Label | None = None
    # vLLM's
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=128)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    cache_salt: Label | None = None
    return_token_ids: bool | None = None
    # shoal's
    output_token_ids: TokenIds | None = None
    continuation: str | None = None
    resumable: bool | None = None

    @property
    def shows_token_ids(self) -> bool:
        """Of the output; only return_token_ids shows the prompt's."""
        return bool(self.return_token_ids or self.resumable)


class CompletionRequest(GenerationFields):
    """Body of /v1/completions."""

    unsupported = UNSUPPORTED_COMPLETION

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool = True


class TextPart(WireModel):
    unsupported = UNSUPPORTED_PART

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("str")]
    | Annotated[list[TextPart], Field(max_length=4096, fail_fast=True), Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, list) else "str"),
]


class ChatMessage(WireModel):
    unsupported = UNSUPPORTED_MESSAGE

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Label | None = None

    def as_template_input(self) -> dict[str, str]:
        """As chat templates expect it: text only, developer spoken by the system."""
        content = self.content
        if isinstance(content, list):
            # vLLM joins the parts of a message with newlines.
            content = "\n".join(part.text for part in content)
        message = {
            "role": "system" if self.role == "developer" else self.role,
            "content": content,
        }
        return message if self.name is None else {**message, "name": self.name}


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=16_384, fail_fast=True)]


class ChatFields(WireModel):
    """How messages become a prompt (all vLLM's)."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatRequest(ChatFields, GenerationFields):
    """Body of /v1/chat/completions."""

    unsupported = UNSUPPORTED_CHAT

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None


class TokenizeRequest(ChatFields):
    """Body of /tokenize: a prompt or messages."""

    model: Label | None = None
    prompt: str | None = None
    messages: Messages | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(WireModel):
    """Body of /detokenize."""

    model: Label | None = None
    tokens: TokenIds
