//! The OpenAPI document (<https://spec.openapis.org/oas/v3.1.0>): made of the types that the
//! daemon reads and writes.

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use super::operations::{ANY, Answer, Operation, all, error};

/// The document.
pub fn document() -> Value {
    let mut settings = SchemaSettings::draft2020_12();
    settings.definitions_path = "/components/schemas".into();
    let mut generator = settings.into_generator();
    let mut paths = Map::new();
    for operation in all() {
        let described = describe(&operation, &mut generator);
        let path = paths.entry(operation.path).or_insert_with(|| json!({}));
        path[operation.method] = described;
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "snapback",
            "summary": "Pools of QEMU guests that wait in an instant before their first instruction",
            "version": env!("CARGO_PKG_VERSION"),
            "license": {"name": "MIT OR Apache-2.0", "identifier": "MIT OR Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": generator.take_definitions(true),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        // By the Unix socket none is needed.
        "security": [{}, {"token": []}],
    })
}

fn describe(operation: &Operation, generator: &mut schemars::SchemaGenerator) -> Value {
    let content = |kind: &str, schema: Value| {
        let mut content = Map::new();
        content.insert(kind.to_owned(), json!({ "schema": schema }));
        Value::Object(content)
    };
    let mut answer = json!({"description": operation.summary});
    match operation.answer {
        Answer::Nothing => {}
        Answer::Json(of) => {
            answer["content"] = content("application/json", of(generator).to_value());
        }
        Answer::Events(of) => {
            answer["content"] = content("text/event-stream", of(generator).to_value());
        }
        Answer::Text(kind) => answer["content"] = content(kind, json!({"type": "string"})),
    }
    let codes = operation.errors.iter().chain(&ANY).map(|kind| kind.code());
    let codes: Vec<_> = codes.collect();
    let mut responses = Map::new();
    responses.insert(operation.status.to_string(), answer);
    responses.insert(
        "default".to_owned(),
        json!({
            "description": format!("Codes, among others: {}", codes.join(", ")),
            "content": content("application/json", error(generator).to_value()),
        }),
    );
    let mut described = json!({
        "operationId": operation.id,
        "summary": operation.summary,
        "responses": responses,
    });
    if let Some(body) = &operation.body {
        described["requestBody"] = json!({
            "required": body.required,
            "content": content("application/json", (body.of)(generator).to_value()),
        });
    }
    let parameters = operation.path.split('{').skip(1).filter_map(|part| part.split('}').next());
    let parameters: Vec<Value> = parameters
        .map(|name| {
            json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}})
        })
        .collect();
    if !parameters.is_empty() {
        described["parameters"] = parameters.into();
    }
    described
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_that_is_kept_is_the_one_that_the_daemon_gives() {
        let kept: Value = serde_json::from_str(include_str!("../../docs/openapi.json")).unwrap();
        assert!(kept == document(), "write it anew: snapback schema --openapi > docs/openapi.json");
    }
}
