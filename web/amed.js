// What Python cannot do in the browser: say our sentence at once where a run failed, fold what is advanced in the old
// canvas, too, and show what a predictor file is for before anything runs.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const OURS = /AMED|"amed/;
const FOLDER = `/${decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2))}/`; // of this pack
const LIFE = 30000; // of a toast, in ms
const ABOUT = "made for"; // the name of the text on AMED Load Predictor
const TELL = "AMED.Errors.Tell"; // the ids of our settings
const FOLD = "AMED.Inputs.Fold";
const NO_ROOM = -4; // the height of a widget that takes none, for the canvas adds 4 between widgets

const chosen = (setting) => app.extensionManager?.setting?.get(setting) ?? true;

function toast(severity, summary, detail) {
  app.extensionManager?.toast?.add({ severity, summary, detail, life: LIFE });
}

// ComfyUI from 0.16 on shows only that a node failed; what it said stands behind "View details".
function tellFailure({ detail }) {
  const said = detail?.exception_message?.trim();
  const raised = detail?.traceback?.at(-1)?.replaceAll("\\", "/").includes(FOLDER);
  if (said && chosen(TELL) && (raised || detail.node_type?.startsWith("AMED") || OURS.test(said))) {
    toast("error", detail.node_type, said);
  }
}

// Nodes 2.0 folds advanced inputs by itself, the old canvas those whose widgets say so; it leaves their places empty
// unless they have no height.
function foldAdvanced(node, folds = chosen(FOLD)) {
  const inputs = node.constructor?.nodeData?.input;
  const every = { ...inputs?.required, ...inputs?.optional };
  for (const widget of node.widgets ?? []) {
    if (!every[widget.name]?.[1]?.advanced) continue;
    widget.advanced = folds;
    widget.computeSize = (width) => [
      width ?? 0,
      widget.advanced && !node.showAdvanced ? NO_ROOM : LiteGraph.NODE_WIDGET_HEIGHT,
    ];
  }
}

const isOurs = (node) => (node.comfyClass ?? "").startsWith("AMED");

// ComfyUI tells of a setting before it keeps it.
function foldAgain(folds) {
  for (const node of app.graph?._nodes ?? []) {
    if (!isOurs(node)) continue;
    foldAdvanced(node, folds);
    node.expandToFitContent?.();
  }
  app.graph?.setDirtyCanvas(true, true);
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
  settings: [
    {
      id: TELL,
      category: ["AMED", "Errors", "Tell"],
      name: "Show errors of AMED as a notice at once",
      tooltip: "Newer ComfyUI says only which node failed. With this, what is wrong and which widget to set is shown in the corner, too.",
      type: "boolean",
      defaultValue: true,
    },
    {
      id: FOLD,
      category: ["AMED", "Inputs", "Fold"],
      name: "Fold advanced inputs in the old canvas",
      tooltip: "As Nodes 2.0 does by itself. Folded inputs are shown by Show Advanced in a node's menu.",
      type: "boolean",
      defaultValue: true,
      onChange: foldAgain,
    },
  ],
  setup() {
    api.addEventListener("execution_error", tellFailure);
  },
  nodeCreated(node) {
    if (!isOurs(node)) return;
    foldAdvanced(node);
    if (node.comfyClass === "AMEDLoadPredictor") showSettings(node);
  },
});
