//! Compiles the schema in `schema/` without any system tool, and derives from the same descriptors what prost does not
//! know: which fields are required, which enum values exist (`shapes.rs`), and which services there are.

use std::{collections::BTreeMap, env, fmt::Write as _, fs, io, path::PathBuf};

use prost_build::Config;
use protox::prost_reflect::{Cardinality, DescriptorPool, FieldDescriptor, Kind, MessageDescriptor};

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=schema");
    let mut files = Vec::new();
    for entry in fs::read_dir("schema")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.ends_with(".proto") {
            files.push(name);
        }
    }
    files.sort();
    let descriptors = protox::compile(&files, ["schema"]).map_err(io::Error::other)?;
    let pool = DescriptorPool::from_file_descriptor_set(descriptors.clone()).map_err(io::Error::other)?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or_else(|| io::Error::other("OUT_DIR is not set"))?);
    Config::new().bytes(["."]).include_file("schema.rs").compile_fds(descriptors)?;
    fs::write(out.join("shapes.rs"), shapes(&pool).map_err(io::Error::other)?)
}

/// One `Shape` per message, its trait impl, and the table of services.
fn shapes(pool: &DescriptorPool) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    let messages: BTreeMap<String, MessageDescriptor> =
        pool.all_messages().filter(|m| !m.is_map_entry()).map(|m| (m.full_name().to_owned(), m)).collect();
    for message in messages.values() {
        let mut fields: Vec<FieldDescriptor> = message.fields().collect();
        fields.sort_by_key(FieldDescriptor::number);
        assert!(
            fields.len() <= 64,
            "{}: the check of required fields counts on at most 64 fields",
            message.full_name()
        );
        writeln!(text, "static {}: Shape = Shape {{ name: {:?}, fields: &[", constant(message), message.full_name())?;
        for field in &fields {
            let required = field.cardinality() == Cardinality::Required;
            writeln!(text, "    Field {{ number: {}, required: {required}, kind: {} }},", field.number(), kind(field))?;
        }
        writeln!(text, "] }};")?;
        let path = format!("{}.{}", message.package_name(), message.name()).replace('.', "::");
        writeln!(
            text,
            "impl Checked for crate::schema::{path} {{ const SHAPE: &'static Shape = &{}; }}",
            constant(message)
        )?;
    }
    writeln!(text, "/// Every service of the schema; which of them a server offers is its own choice.")?;
    writeln!(text, "pub static SERVICES: &[Service] = &[")?;
    for service in pool.services() {
        writeln!(text, "    Service {{ name: {:?}, short: {:?}, methods: &[", service.full_name(), service.name())?;
        for method in service.methods() {
            let (input, output) = (constant(&method.input()), constant(&method.output()));
            writeln!(text, "        Method {{ name: {:?}, request: &{input}, response: &{output} }},", method.name())?;
        }
        writeln!(text, "    ] }},")?;
    }
    writeln!(text, "];")?;
    Ok(text)
}

fn constant(message: &MessageDescriptor) -> String {
    message.full_name().replace('.', "_").to_uppercase()
}

fn kind(field: &FieldDescriptor) -> String {
    match field.kind() {
        // prost checks what little there is to check in a map entry.
        Kind::Message(message) if message.is_map_entry() => "Kind::Bytes".into(),
        Kind::Message(message) => format!("Kind::Message(&{})", constant(&message)),
        Kind::Enum(values) => {
            let numbers: Vec<i32> = values.values().map(|v| v.number()).collect();
            format!("Kind::Enum(&{numbers:?})")
        }
        Kind::String | Kind::Bytes => "Kind::Bytes".into(),
        Kind::Double | Kind::Fixed64 | Kind::Sfixed64 => "Kind::Fixed64".into(),
        Kind::Float | Kind::Fixed32 | Kind::Sfixed32 => "Kind::Fixed32".into(),
        _ => "Kind::Varint".into(),
    }
}
