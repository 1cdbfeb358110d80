//! The figures of pools in Prometheus' text format
//! (<https://prometheus.io/docs/instrumenting/exposition_formats/>).

use std::fmt::Write;

use crate::pools::{Figures, Histogram, PoolState, PoolView};

pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All figures of these pools.
pub(super) fn text(pools: &[(PoolView, Figures)]) -> String {
    let mut text = String::new();
    let mut metric =
        |name: &str, kind: &str, help: &str, of: &dyn Fn(&PoolView, &Figures) -> f64| {
            head(&mut text, name, kind, help);
            for (pool, figures) in pools {
                // Writing to a string does not fail.
                let _ = writeln!(text, "{name}{{{}}} {}", label(pool), of(pool, figures));
            }
        };
    metric("snapback_pool_armed", "gauge", "Guests that wait to be taken.", &|pool, _| {
        pool.ready.into()
    });
    metric("snapback_pool_armed_wanted", "gauge", "Guests that are to wait.", &|pool, _| {
        pool.armed.into()
    });
    metric("snapback_pool_running", "gauge", "Guests that are taken.", &|pool, _| {
        pool.running.into()
    });
    metric("snapback_pool_max", "gauge", "Guests that may be taken at a time.", &|pool, _| {
        pool.max.into()
    });
    metric("snapback_pool_waiting", "gauge", "Requests that wait for a guest.", &|pool, _| {
        pool.waiting.into()
    });
    metric("snapback_pool_degraded", "gauge", "Whether no guest can be started.", &|pool, _| {
        f64::from(u8::from(pool.state == PoolState::Degraded))
    });
    metric(
        "snapback_pool_memory_bytes",
        "gauge",
        "Bytes of memory that the pool's QEMUs have of their own.",
        &|pool, _| pool.used_bytes.unwrap_or_default() as f64,
    );
    metric("snapback_armed_total", "counter", "Guests that were armed.", &|_, figures| {
        figures.armed as f64
    });
    metric("snapback_released_total", "counter", "Guests that are no more.", &|_, figures| {
        figures.released as f64
    });
    metric(
        "snapback_faults_total",
        "counter",
        "Requests for memory that were served, of guests that are no more.",
        &|_, figures| figures.faults as f64,
    );
    metric(
        "snapback_memory_bytes_total",
        "counter",
        "Bytes of memory that were brought, of guests that are no more.",
        &|_, figures| figures.bytes as f64,
    );
    let hits = |pool: &PoolView| pool.cache.map_or(0.0, |cache| cache.hits as f64);
    let misses = |pool: &PoolView| pool.cache.map_or(0.0, |cache| cache.misses as f64);
    let bytes = |pool: &PoolView| pool.cache.map_or(0.0, |cache| cache.bytes as f64);
    metric(
        "snapback_cache_hits_total",
        "counter",
        "Chunks of the pool's image that were found decompressed; pools of one image have one cache.",
        &|pool, _| hits(pool),
    );
    metric(
        "snapback_cache_misses_total",
        "counter",
        "Chunks of the pool's image that had to be read.",
        &|pool, _| misses(pool),
    );
    metric("snapback_cache_bytes", "gauge", "Bytes of chunks that are kept.", &|pool, _| {
        bytes(pool)
    });
    head(&mut text, "snapback_failures_total", "counter", "Failures, by their code.");
    for (pool, figures) in pools {
        for (code, count) in &figures.failures {
            let _ = writeln!(
                text,
                "snapback_failures_total{{{},code=\"{}\"}} {count}",
                label(pool),
                escaped(code)
            );
        }
    }
    let takes = |figures: &Figures| figures.takes.clone();
    let help = "From the request for a guest until QEMU ran it.";
    histogram(&mut text, "snapback_take_seconds", help, "", pools, takes);
    let name = "snapback_reset_seconds";
    let help = "From the request for a reset until QEMU ran the guest again.";
    let in_place = |figures: &Figures| figures.resets_in_place.clone();
    histogram(&mut text, name, help, ",how=\"in_place\"", pools, in_place);
    let new_process = |figures: &Figures| figures.resets_new_process.clone();
    histogram(&mut text, name, "", ",how=\"new_process\"", pools, new_process);
    text
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// A histogram of each pool; without `help` it goes on with the metric before it.
fn histogram(
    text: &mut String,
    name: &str,
    help: &str,
    more: &str,
    pools: &[(PoolView, Figures)],
    of: impl Fn(&Figures) -> Histogram,
) {
    if !help.is_empty() {
        head(text, name, "histogram", help);
    }
    for (pool, figures) in pools {
        let (label, histogram) = (label(pool) + more, of(figures));
        for (bound, count) in histogram.cumulative() {
            let _ = writeln!(text, "{name}_bucket{{{label},le=\"{bound}\"}} {count}");
        }
        let (count, sum) = (histogram.count(), histogram.sum());
        let _ = writeln!(text, "{name}_bucket{{{label},le=\"+Inf\"}} {count}");
        let _ = writeln!(text, "{name}_sum{{{label}}} {sum}\n{name}_count{{{label}}} {count}");
    }
}

fn label(pool: &PoolView) -> String {
    format!("pool=\"{}\"", escaped(&pool.name))
}

fn escaped(value: &str) -> String {
    value.replace('\\', r"\\").replace('"', r#"\""#).replace('\n', r"\n")
}
