// What Python cannot do in the browser: say our sentence at once where a run failed, fold what is advanced in the old
// canvas, too, and show what a predictor file is for before anything runs.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const OURS = /AMED|"amed/;
const LIFE = 30000; // of a toast, in ms
const ABOUT = "made for"; // the name of the text on AMED Load Predictor

function toast(severity, summary, detail) {
  app.extensionManager?.toast?.add({ severity, summary, detail, life: LIFE });
}

// ComfyUI from 0.16 on shows only that a node failed; what it said stands behind "View details".
function tellFailure({ detail }) {
  const said = detail?.exception_message?.trim();
  if (said && (detail.node_type?.startsWith("AMED") || OURS.test(said))) {
    toast("error", detail.node_type, said);
  }
}

// Nodes 2.0 folds advanced inputs by itself, the old canvas those whose widgets say so.
function foldAdvanced(node, inputs) {
  const every = { ...inputs?.required, ...inputs?.optional };
  for (const widget of node.widgets ?? []) {
    if (every[widget.name]?.[1]?.advanced) widget.advanced = true;
  }
}

async function describe(name) {
  const answer = await api.fetchApi(`/amed/predictor?name=${encodeURIComponent(name)}`);
  return answer.ok ? await answer.json() : { brief: "", full: "" };
}

function showSettings(node) {
  const file = node.widgets?.find((widget) => widget.name === "predictor_name");
  if (!file) return;
  let brief = "";
  const keep = () => (about.value = brief); // it is to be read, and whatever is written into it is undone
  const about = node.addWidget("text", ABOUT, "", keep, { serialize: false });
  about.serialize = false;
  const update = async () => {
    const found = await describe(file.value);
    brief = about.value = found.brief;
    about.tooltip = found.full;
    node.setDirtyCanvas?.(true, true);
  };
  const before = file.callback;
  file.callback = function (...values) {
    update();
    return before?.apply(this, values);
  };
  const configured = node.onConfigure;
  node.onConfigure = function (...values) {
    update();
    return configured?.apply(this, values);
  };
  update();
}

app.registerExtension({
  name: "AMED",
  setup() {
    api.addEventListener("execution_error", tellFailure);
  },
  nodeCreated(node) {
    const kind = node.comfyClass ?? "";
    if (!kind.startsWith("AMED")) return;
    foldAdvanced(node, node.constructor?.nodeData?.input);
    if (kind === "AMEDLoadPredictor") showSettings(node);
  },
});
