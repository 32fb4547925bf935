// Figures for people: three digits that matter, and a unit.

const THIN = "\u202f";

export function digits(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 100) return value.toFixed(0);
  if (size >= 10) return value.toFixed(1);
  return value.toFixed(2);
}

export function ms(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 60000) return duration(value / 1000);
  if (value >= 1000) return `${digits(value / 1000)}${THIN}s`;
  return `${digits(value)}${THIN}ms`;
}

export function count(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 1e9) return `${digits(value / 1e9)}G`;
  if (value >= 1e6) return `${digits(value / 1e6)}M`;
  if (value >= 1e4) return `${digits(value / 1e3)}k`;
  return Number.isInteger(value) ? String(value) : digits(value);
}

export function bytes(value) {
  if (!value) return "0 B";
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = Math.min(units.length - 1, Math.floor(Math.log10(Math.max(1, value)) / 3));
  return `${digits(value / 1000 ** power)}${THIN}${units[power]}`;
}

export function percent(share) {
  if (share === null || share === undefined || Number.isNaN(share)) return "–";
  const value = share * 100;
  if (value > 0 && value < 0.1) return `<0.1${THIN}%`;
  return `${value >= 99.95 || value >= 10 || Number.isInteger(value) ? value.toFixed(0) : value.toFixed(1)}${THIN}%`;
}

export function duration(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  if (whole < 60) return `${whole}${THIN}s`;
  if (whole < 3600) return `${Math.floor(whole / 60)}${THIN}min`;
  if (whole < 86400) return `${Math.floor(whole / 3600)}${THIN}h ${Math.floor((whole % 3600) / 60)}${THIN}min`;
  return `${Math.floor(whole / 86400)}${THIN}d ${Math.floor((whole % 86400) / 3600)}${THIN}h`;
}

export function clock(atS) {
  return new Date(atS * 1000).toLocaleTimeString([], { hour12: false });
}

// Of a worker's processes; empty for a single one.
export function degree(worker) {
  const parts = [["TP", worker.tensor_parallel], ["PP", worker.pipeline_parallel]];
  return parts.filter(([, number]) => number > 1).map(([name, number]) => `${name}${THIN}${number}`).join(" × ");
}

// Without the model's name in front of it, which the heading says already.
export function shortName(workerId, model) {
  return model && workerId.startsWith(`${model}/`) ? workerId.slice(model.length + 1) : workerId;
}
