// A conversation with two tools over gRPC, through a client generated from protos/ by protoc-gen-es.
//
//   make setup-dev && . .maas/dev.env && cd docs/clients/node && npm ci && npm run gen && npm start
//
// The model is made to call each tool once, with arguments that match the tool's schema; their
// results go back to it, and it answers in words.

import { createClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { GenerationService } from "./gen/maas/inference/v1/generation_service_pb.js";
import { Role } from "./gen/maas/inference/v1/generation_pb.js";
import { ToolMode } from "./gen/maas/inference/v1/tools_pb.js";

const SCHEMA = JSON.stringify({
  type: "object",
  properties: { city: { enum: ["Paris", "Rome", "Oslo"] } },
  required: ["city"],
  additionalProperties: false,
});

// What the application can do: a description for the model, and the work itself.
const TOOLS = {
  get_weather: { description: "Gets the weather of a city.", run: ({ city }) => ({ city, sky: "clear", celsius: 21 }) },
  get_time: { description: "Gets the time in a city.", run: ({ city }) => ({ city, clock: "12:30" }) },
};

const text = (role, words, more = {}) => ({ role, parts: [{ part: { case: "text", value: words } }], ...more });

const transport = createGrpcTransport({ baseUrl: `http://${process.env.MAAS_ENDPOINT}` });
const client = createClient(GenerationService, transport);
const headers = { authorization: `Bearer ${process.env.MAAS_API_KEY}` };

// Streams one turn; the deltas of its text and of its tool calls are put together here.
async function turn(messages, mode, requiredTool = "") {
  const spec = {
    model: process.env.MAAS_MODEL,
    input: { case: "chat", value: { messages } },
    sampling: { temperature: 0 },
    stop: { maxOutputTokens: 200 },
    tools: {
      tools: Object.entries(TOOLS).map(([name, { description }]) => ({
        name,
        description,
        parametersJsonSchema: SCHEMA,
        strict: true,
      })),
      mode,
      requiredTool,
      parallelCalls: false,
    },
  };
  const calls = [];
  let words = "";
  let usage;
  for await (const { frame } of client.streamGenerate({ spec }, { headers })) {
    if (frame.event.case === "finished") usage = frame.event.value.usage;
    if (frame.event.case !== "delta") continue;
    for (const { content } of frame.event.value.outputs) {
      if (content.case === "text") words += content.value;
      if (content.case === "toolCall") {
        const { callIndex, id, name, argumentsJson } = content.value;
        calls[callIndex] ??= { id, name, argumentsJson: "" };
        calls[callIndex].argumentsJson += argumentsJson;
      }
    }
  }
  if (usage === undefined) throw new Error("the stream was cut on its way");
  return { calls, words, usage };
}

const messages = [text(Role.USER, "What are the weather and the time in Paris?")];
for (const name of Object.keys(TOOLS)) {
  const { calls } = await turn(messages, ToolMode.REQUIRED, name);
  messages.push({ role: Role.ASSISTANT, toolCalls: calls });
  for (const call of calls) {
    const result = JSON.stringify(TOOLS[call.name].run(JSON.parse(call.argumentsJson)));
    console.log(`${call.name}(${call.argumentsJson}) -> ${result}`);
    messages.push(text(Role.TOOL, result, { toolCallId: call.id }));
  }
}
const { words, usage } = await turn(messages, ToolMode.NONE);
console.log(`answer: ${words.trim()}`);
console.log(`usage of the last turn: ${usage.inputTokens} in, ${usage.outputTokens} out`);
