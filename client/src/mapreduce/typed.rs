//! Programs over typed keys and values.
//!
//! # Overview
//! [`Map`], [`Reduce`] and [`Combine`] are [`super::Mapper`], [`super::Reducer`] and [`super::Combiner`] over [`Key`] and [`Value`]; a [`Job`] puts them
//! together into a [`Program`]. Keys come to reducers in their own order, because their encoding keeps it ([`super::encode`]).
//!
//! ```
//! use cairn_client::mapreduce::typed::{Emit, Job, Map, Reduce, TypedValues};
//! use cairn_client::mapreduce::{Output, Record, Result};
//!
//! /// Length of each word.
//! struct Lengths;
//!
//! impl Map for Lengths {
//!     type Key = u32;
//!     type Value = String;
//!     fn map(&mut self, record: Record<'_>, out: &mut Emit<'_, u32, String>) -> Result<()> {
//!         String::from_utf8_lossy(record.bytes).split(' ').try_for_each(|word| out.emit(word.len() as u32, word))
//!     }
//! }
//!
//! struct Join;
//!
//! impl Reduce for Join {
//!     type Key = u32;
//!     type Value = String;
//!     fn reduce(&mut self, length: u32, words: &mut TypedValues<'_, '_, u32, String>, out: &mut Output) -> Result<()> {
//!         let mut all = Vec::new();
//!         while let Some(word) = words.next()? {
//!             all.push(word);
//!         }
//!         out.line(format!("{length}: {}", all.join(" ")).as_bytes())
//!     }
//! }
//!
//! let program = Job::new(|_| Ok(Lengths)).reduce(|_| Ok(Join));
//! ```

use std::any::type_name;
use std::marker::PhantomData;
use std::sync::Arc;

use cairn_proto::{Error, ErrorCode, Result};

use super::encode::{Key, ToKey, ToValue, Value};
use super::output::NamedOutput;
use super::{
    Collector, Combine as Combining, Combiner, Grouping, InputFormat, KeyPrefix, KeyRanges, Mapper, Output,
    OutputFormat, Partitioner, Program, Record, Reducer, TaskContext, Values,
};

/// Turns records into typed keys with values.
pub trait Map: Send {
    /// Keys that it emits.
    type Key: Key;
    /// Values that it emits.
    type Value: Value;

    /// Takes one record. An error fails the attempt; it need not name the record.
    fn map(&mut self, record: Record<'_>, out: &mut Emit<'_, Self::Key, Self::Value>) -> Result<()>;

    /// The input has ended.
    fn finish(&mut self, _out: &mut Emit<'_, Self::Key, Self::Value>) -> Result<()> {
        Ok(())
    }
}

/// Turns a key and all its values into output.
pub trait Reduce: Send {
    /// Keys of the map.
    type Key: Key;
    /// Values of the map.
    type Value: Value;

    /// Takes one key (in a job that groups by a part of the key: the first of the group).
    fn reduce(
        &mut self,
        key: Self::Key,
        values: &mut TypedValues<'_, '_, Self::Key, Self::Value>,
        out: &mut Output,
    ) -> Result<()>;

    /// There is no further key.
    fn finish(&mut self, _out: &mut Output) -> Result<()> {
        Ok(())
    }
}

/// Joins values of one key; may be applied never, once, or again to its own results.
pub trait Combine: Send {
    /// Keys of the map.
    type Key: Key;
    /// Values of the map.
    type Value: Value;

    /// Takes one key and some of its values, and emits values that stand for them.
    fn combine(
        &mut self,
        key: Self::Key,
        values: &mut TypedValues<'_, '_, Self::Key, Self::Value>,
        emit: &mut dyn FnMut(Self::Value) -> Result<()>,
    ) -> Result<()>;
}

/// Chooses the reducer of a key.
pub trait Partition<K>: Send + Sync {
    /// A number below `reducers`.
    fn partition(&self, key: K, reducers: u32) -> u32;
}

impl<K, F: Fn(K, u32) -> u32 + Send + Sync> Partition<K> for F {
    fn partition(&self, key: K, reducers: u32) -> u32 {
        self(key, reducers)
    }
}

/// Takes what a [`Map`] emits.
pub struct Emit<'a, K, V> {
    collector: &'a mut Collector,
    scratch: &'a mut Scratch,
    types: PhantomData<fn(K, V)>,
}

#[derive(Default)]
struct Scratch {
    key: Vec<u8>,
    value: Vec<u8>,
}

impl<K: Key, V: Value> Emit<'_, K, V> {
    /// Takes a key with a value.
    #[inline]
    pub fn emit(&mut self, key: impl ToKey<K>, value: impl ToValue<V>) -> Result<()> {
        let Scratch { key: key_bytes, value: value_bytes } = &mut *self.scratch;
        key_bytes.clear();
        key.write_last_key(key_bytes);
        value_bytes.clear();
        value.write_last_value(value_bytes);
        self.collector.emit(key_bytes, value_bytes)
    }

    /// Takes a line of output, in a job without reducers.
    pub fn line(&mut self, line: &[u8]) -> Result<()> {
        self.collector.emit_line(line)
    }

    /// A further output of a job without reducers; see [`Output::named`].
    pub fn named(&mut self, name: &str) -> Result<NamedOutput<'_>> {
        self.collector.named(name)
    }

    /// Adds to a counter of the program's own.
    pub fn count(&self, name: &str, by: u64) {
        self.collector.count(name, by);
    }
}

/// The values of one key, one after the other.
pub struct TypedValues<'a, 'b, K, V> {
    values: &'a mut Values<'b>,
    types: PhantomData<fn() -> (K, V)>,
}

impl<K: Key, V: Value> TypedValues<'_, '_, K, V> {
    /// The next value.
    #[allow(clippy::should_implement_trait)] // it can fail
    pub fn next(&mut self) -> Result<Option<V>> {
        self.values.next()?.map(decode_value).transpose()
    }

    /// The next value with its own key, which differs from value to value in a job that groups by a part of the key.
    pub fn next_with_key(&mut self) -> Result<Option<(K, V)>> {
        let Some(value) = self.values.next()?.map(decode_value).transpose()? else { return Ok(None) };
        Ok(Some((decode_key(self.values.key())?, value)))
    }
}

fn decode_key<K: Key>(bytes: &[u8]) -> Result<K> {
    K::read_last_key(bytes).ok_or_else(|| not_a(bytes, "key", type_name::<K>()))
}

fn decode_value<V: Value>(bytes: &[u8]) -> Result<V> {
    V::read_last_value(bytes).ok_or_else(|| not_a(bytes, "value", type_name::<V>()))
}

#[cold]
fn not_a(bytes: &[u8], what: &str, kind: &str) -> Error {
    let shown = &bytes[..bytes.len().min(32)];
    Error::new(ErrorCode::Corrupt, format!("{} bytes ({shown:02x?}...) are no {what} of type {kind}", bytes.len()))
}

impl<'a> Record<'a> {
    /// Key and value as a typed job wrote them ([`Output::put`], binary output).
    pub fn decode<K: Key, V: Value>(&self) -> Result<(K, V)> {
        Ok((decode_key(self.key)?, decode_value(self.bytes)?))
    }

    /// Its bytes as text.
    pub fn text(&self) -> Result<&'a str> {
        std::str::from_utf8(self.bytes)
            .map_err(|error| Error::new(ErrorCode::InvalidArgument, format!("the record is not UTF-8: {error}")))
    }
}

impl Output {
    /// Writes key and value in their encodings, for a binary output that another job reads with [`Record::decode`].
    pub fn put<K: Key, V: Value>(&mut self, key: impl ToKey<K>, value: impl ToValue<V>) -> Result<()> {
        let (mut key_bytes, mut value_bytes) = (Vec::new(), Vec::new());
        key.write_last_key(&mut key_bytes);
        value.write_last_value(&mut value_bytes);
        self.emit(&key_bytes, &value_bytes)
    }
}

type Make<T> = Box<dyn Fn(&TaskContext) -> Result<Box<T>> + Send + Sync>;

/// A typed program, built part by part. `K` and `V` are what its maps emit.
pub struct Job<K, V> {
    input: InputFormat,
    output: OutputFormat,
    mapper: Make<dyn Mapper>,
    reducer: Option<Make<dyn Reducer>>,
    combine: Box<dyn Fn() -> Combining + Send + Sync>,
    partitioner: Partitioner,
    grouping: Grouping,
    types: PhantomData<fn(K, V)>,
}

impl<K: Key + 'static, V: Value + 'static> Job<K, V> {
    /// A job whose tasks map with what `make` makes for each.
    pub fn new<M: Map<Key = K, Value = V> + 'static>(
        make: impl Fn(&TaskContext) -> Result<M> + Send + Sync + 'static,
    ) -> Self {
        let mapper = move |task: &TaskContext| -> Result<Box<dyn Mapper>> {
            Ok(Box::new(Mapping { map: make(task)?, scratch: Scratch::default() }))
        };
        Self {
            input: InputFormat::Lines,
            output: OutputFormat::TEXT,
            mapper: Box::new(mapper),
            reducer: None,
            combine: Box::new(|| Combining::Never),
            partitioner: Partitioner::Hash,
            grouping: Grouping::WholeKey,
            types: PhantomData,
        }
    }

    /// What its reduce tasks reduce with.
    #[must_use]
    pub fn reduce<R: Reduce<Key = K, Value = V> + 'static>(
        mut self,
        make: impl Fn(&TaskContext) -> Result<R> + Send + Sync + 'static,
    ) -> Self {
        self.reducer = Some(Box::new(move |task| Ok(Box::new(Reducing(make(task)?)))));
        self
    }

    /// Joins values in the map tasks.
    #[must_use]
    pub fn combine<C: Combine<Key = K, Value = V> + 'static>(
        mut self,
        make: impl Fn() -> C + Send + Sync + 'static,
    ) -> Self {
        self.combine = Box::new(move || Combining::With(Box::new(Joining(make()))));
        self
    }

    /// Joins values two by two in the map tasks: [`Self::combine`] for a sum, a maximum and the like. `join` must be associative and commutative.
    #[must_use]
    pub fn fold(self, join: impl Fn(V, V) -> V + Clone + Send + Sync + 'static) -> Self {
        self.combine(move || Folding { join: join.clone(), types: PhantomData })
    }

    /// What the records of its input are; lines if this is not called.
    #[must_use]
    pub fn input(mut self, format: InputFormat) -> Self {
        self.input = format;
        self
    }

    /// What its output looks like; text if this is not called.
    #[must_use]
    pub fn output(mut self, format: OutputFormat) -> Self {
        self.output = format;
        self
    }

    /// Which reducer a key goes to; by a hash if this is not called.
    #[must_use]
    pub fn partition(mut self, choose: impl Partition<K> + 'static) -> Self {
        // A key that does not decode was not emitted by this job's map: any reducer will refuse it.
        let choose = move |key: &[u8], reducers| K::read_last_key(key).map_or(0, |key| choose.partition(key, reducers));
        self.partitioner = Partitioner::Own(Arc::new(choose));
        self
    }

    /// Sends keys to reducers by ranges, so that the files of the output follow on each other in order. n cuts make n + 1 ranges.
    pub fn ranges(mut self, cuts: &[K]) -> Result<Self> {
        let encode = |cut: &K| {
            let mut bytes = Vec::new();
            cut.write_last_key(&mut bytes);
            bytes
        };
        self.partitioner = Partitioner::Ranges(KeyRanges::new(cuts.iter().map(encode).collect())?);
        Ok(self)
    }
}

impl<K: Key + 'static> Job<K, u64> {
    /// Adds values up in the map tasks, in a hash table: the fast way of counting.
    #[must_use]
    pub fn sum(mut self) -> Self {
        self.combine = Box::new(|| Combining::Sum);
        self
    }
}

impl<A: Key + 'static, B: Key + 'static, V: Value + 'static> Job<(A, B), V> {
    /// A secondary sort: one call of the reducer for all keys with the same first part, whose values come in the order of the second part.
    #[must_use]
    pub fn group_by_first(mut self) -> Self {
        let length = |key: &[u8]| {
            let mut rest = key;
            A::skip_key(&mut rest).map_or(key.len(), |()| key.len() - rest.len())
        };
        let prefix = KeyPrefix::By(Arc::new(length));
        self.partitioner = Partitioner::HashPrefix(prefix.clone());
        self.grouping = Grouping::Prefix(prefix);
        self
    }
}

impl<K: Send + Sync, V: Send + Sync> Program for Job<K, V> {
    fn input(&self) -> InputFormat {
        self.input
    }

    fn mapper(&self, task: &TaskContext) -> Result<Box<dyn Mapper>> {
        (self.mapper)(task)
    }

    fn combine(&self) -> Combining {
        (self.combine)()
    }

    fn partitioner(&self) -> Result<Partitioner> {
        Ok(self.partitioner.clone())
    }

    fn grouping(&self) -> Grouping {
        self.grouping.clone()
    }

    fn reducer(&self, task: &TaskContext) -> Result<Box<dyn Reducer>> {
        match &self.reducer {
            Some(make) => make(task),
            None => Err(Error::new(ErrorCode::InvalidArgument, "the job has no reducer: it must run with 0 reducers")),
        }
    }

    fn output(&self) -> OutputFormat {
        self.output
    }
}

struct Mapping<M> {
    map: M,
    scratch: Scratch,
}

impl<M: Map> Mapper for Mapping<M> {
    fn map(&mut self, record: Record<'_>, out: &mut Collector) -> Result<()> {
        let mut emit = Emit { collector: out, scratch: &mut self.scratch, types: PhantomData };
        self.map.map(record, &mut emit)
    }

    fn finish(&mut self, out: &mut Collector) -> Result<()> {
        let mut emit = Emit { collector: out, scratch: &mut self.scratch, types: PhantomData };
        self.map.finish(&mut emit)
    }
}

struct Reducing<R>(R);

impl<R: Reduce> Reducer for Reducing<R> {
    fn reduce(&mut self, key: &[u8], values: &mut Values<'_>, out: &mut Output) -> Result<()> {
        self.0.reduce(decode_key(key)?, &mut TypedValues { values, types: PhantomData }, out)
    }

    fn finish(&mut self, out: &mut Output) -> Result<()> {
        self.0.finish(out)
    }
}

struct Joining<C>(C);

impl<C: Combine> Combiner for Joining<C> {
    fn combine(
        &mut self,
        key: &[u8],
        values: &mut Values<'_>,
        emit: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut bytes = Vec::new();
        self.0.combine(decode_key(key)?, &mut TypedValues { values, types: PhantomData }, &mut |value| {
            bytes.clear();
            value.write_last_value(&mut bytes);
            emit(&bytes)
        })
    }
}

struct Folding<F, K, V> {
    join: F,
    types: PhantomData<fn(K, V)>,
}

impl<K: Key, V: Value, F: Fn(V, V) -> V + Send> Combine for Folding<F, K, V> {
    type Key = K;
    type Value = V;

    fn combine(
        &mut self,
        _key: K,
        values: &mut TypedValues<'_, '_, K, V>,
        emit: &mut dyn FnMut(V) -> Result<()>,
    ) -> Result<()> {
        let Some(mut all) = values.next()? else { return Ok(()) };
        while let Some(value) = values.next()? {
            all = (self.join)(all, value);
        }
        emit(all)
    }
}
