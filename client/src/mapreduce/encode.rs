//! Typed keys and values as bytes.
//!
//! Keys are encoded so that their bytes order like what they stand for, because the shuffle compares bytes and nothing else. An encoding also tells its own
//! end, so that keys can be put together in tuples; only the last part of a key (or the only one) goes without what marks its end.
//!
//! | key | bytes |
//! |---|---|
//! | unsigned integer | big endian |
//! | signed integer | big endian, sign bit flipped |
//! | float | big endian; sign bit flipped if positive, all bits if negative: the order of `total_cmp` |
//! | bool | 0, 1 |
//! | string, bytes | as they are with `00` as `00 ff`, ended by `00 00`; at the end of a key as they are |
//! | option | 0; 1 and the value |
//! | [`Reverse`] | the complement of each byte |
//! | tuple | its parts |
//!
//! Values are not compared: integers are LEB128 (signed ones zigzag), floats little endian, strings and bytes have a length before them unless they come
//! last.

use std::cmp::Reverse;

use super::decode_varint;

/// What encodes as the key `K`: `K` itself, and what it can be borrowed as (`&str` for `String`).
pub trait ToKey<K> {
    /// Appends the encoding.
    fn write_key(&self, out: &mut Vec<u8>);
    /// Appends the encoding of what comes last in a key.
    fn write_last_key(&self, out: &mut Vec<u8>) {
        self.write_key(out);
    }
}

/// A typed key.
pub trait Key: ToKey<Self> + Sized {
    /// Takes a key off the start of `bytes`; `None` if there is none.
    fn read_key(bytes: &mut &[u8]) -> Option<Self>;
    /// Takes a key that all of `bytes` is.
    fn read_last_key(bytes: &[u8]) -> Option<Self> {
        let mut rest = bytes;
        Self::read_key(&mut rest).filter(|_| rest.is_empty())
    }
    /// Passes over a key at the start of `bytes`.
    fn skip_key(bytes: &mut &[u8]) -> Option<()>;
}

/// What encodes as the value `V`.
pub trait ToValue<V> {
    /// Appends the encoding.
    fn write_value(&self, out: &mut Vec<u8>);
    /// Appends the encoding of what comes last in a value.
    fn write_last_value(&self, out: &mut Vec<u8>) {
        self.write_value(out);
    }
}

/// A typed value.
pub trait Value: ToValue<Self> + Sized {
    /// Takes a value off the start of `bytes`; `None` if there is none.
    fn read_value(bytes: &mut &[u8]) -> Option<Self>;
    /// Takes a value that all of `bytes` is.
    fn read_last_value(bytes: &[u8]) -> Option<Self> {
        let mut rest = bytes;
        Self::read_value(&mut rest).filter(|_| rest.is_empty())
    }
}

impl<K, Q: ToKey<K> + ?Sized> ToKey<K> for &Q {
    fn write_key(&self, out: &mut Vec<u8>) {
        (**self).write_key(out);
    }
    fn write_last_key(&self, out: &mut Vec<u8>) {
        (**self).write_last_key(out);
    }
}

impl<V, Q: ToValue<V> + ?Sized> ToValue<V> for &Q {
    fn write_value(&self, out: &mut Vec<u8>) {
        (**self).write_value(out);
    }
    fn write_last_value(&self, out: &mut Vec<u8>) {
        (**self).write_last_value(out);
    }
}

fn take<'a>(bytes: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (head, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    Some(head)
}

fn take_array<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    take(bytes, N)?.try_into().ok()
}

fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let (number, used) = decode_varint(bytes)?;
    *bytes = &bytes[used..];
    Some(number)
}

fn put_varint(number: u64, out: &mut Vec<u8>) {
    out.extend_from_slice(super::encode_count(number, &mut [0; 10]));
}

macro_rules! fixed_key {
    ($($type:ty, $to:expr, $from:expr;)*) => {$(
        impl ToKey<$type> for $type {
            #[inline]
            fn write_key(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&$to(*self).to_be_bytes());
            }
        }
        impl Key for $type {
            #[inline]
            fn read_key(bytes: &mut &[u8]) -> Option<Self> {
                take_array(bytes).map(|bytes| $from(bytes))
            }
            fn skip_key(bytes: &mut &[u8]) -> Option<()> {
                take(bytes, size_of::<$type>()).map(drop)
            }
        }
    )*};
}

fixed_key! {
    u8, |n: u8| n, u8::from_be_bytes;
    u16, |n: u16| n, u16::from_be_bytes;
    u32, |n: u32| n, u32::from_be_bytes;
    u64, |n: u64| n, u64::from_be_bytes;
    u128, |n: u128| n, u128::from_be_bytes;
    i8, |n: i8| n ^ i8::MIN, |bytes| i8::from_be_bytes(bytes) ^ i8::MIN;
    i16, |n: i16| n ^ i16::MIN, |bytes| i16::from_be_bytes(bytes) ^ i16::MIN;
    i32, |n: i32| n ^ i32::MIN, |bytes| i32::from_be_bytes(bytes) ^ i32::MIN;
    i64, |n: i64| n ^ i64::MIN, |bytes| i64::from_be_bytes(bytes) ^ i64::MIN;
    i128, |n: i128| n ^ i128::MIN, |bytes| i128::from_be_bytes(bytes) ^ i128::MIN;
    f32, float_to_bits32, |bytes| float_of_bits32(u32::from_be_bytes(bytes));
    f64, float_to_bits64, |bytes| float_of_bits64(u64::from_be_bytes(bytes));
}

fn float_to_bits32(n: f32) -> u32 {
    let bits = n.to_bits();
    if bits >> 31 == 0 { bits ^ (1 << 31) } else { !bits }
}

fn float_of_bits32(bits: u32) -> f32 {
    f32::from_bits(if bits >> 31 == 1 { bits ^ (1 << 31) } else { !bits })
}

fn float_to_bits64(n: f64) -> u64 {
    let bits = n.to_bits();
    if bits >> 63 == 0 { bits ^ (1 << 63) } else { !bits }
}

fn float_of_bits64(bits: u64) -> f64 {
    f64::from_bits(if bits >> 63 == 1 { bits ^ (1 << 63) } else { !bits })
}

macro_rules! varint_value {
    ($($type:ty, $to:expr, $from:expr;)*) => {$(
        impl ToValue<$type> for $type {
            #[inline]
            fn write_value(&self, out: &mut Vec<u8>) {
                put_varint($to(*self), out);
            }
        }
        impl Value for $type {
            #[inline]
            fn read_value(bytes: &mut &[u8]) -> Option<Self> {
                $from(take_varint(bytes)?).try_into().ok()
            }
        }
    )*};
}

fn zigzag(n: i64) -> u64 {
    ((n << 1) ^ (n >> 63)) as u64
}

fn unzigzag(n: u64) -> i64 {
    (n >> 1) as i64 ^ -((n & 1) as i64)
}

varint_value! {
    u16, u64::from, |n: u64| n;
    u32, u64::from, |n: u64| n;
    u64, |n: u64| n, |n: u64| n;
    i16, |n: i16| zigzag(n.into()), unzigzag;
    i32, |n: i32| zigzag(n.into()), unzigzag;
    i64, zigzag, unzigzag;
}

macro_rules! fixed_value {
    ($($type:ty),*) => {$(
        impl ToValue<$type> for $type {
            #[inline]
            fn write_value(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
        }
        impl Value for $type {
            #[inline]
            fn read_value(bytes: &mut &[u8]) -> Option<Self> {
                take_array(bytes).map(Self::from_le_bytes)
            }
        }
    )*};
}

fixed_value!(u8, i8, u128, i128, f32, f64);

impl ToKey<bool> for bool {
    fn write_key(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }
}

impl Key for bool {
    fn read_key(bytes: &mut &[u8]) -> Option<Self> {
        match take_array(bytes)? {
            [0] => Some(false),
            [1] => Some(true),
            _ => None,
        }
    }
    fn skip_key(bytes: &mut &[u8]) -> Option<()> {
        take(bytes, 1).map(drop)
    }
}

impl ToValue<bool> for bool {
    fn write_value(&self, out: &mut Vec<u8>) {
        self.write_key(out);
    }
}

impl Value for bool {
    fn read_value(bytes: &mut &[u8]) -> Option<Self> {
        Self::read_key(bytes)
    }
}

impl ToKey<()> for () {
    fn write_key(&self, _out: &mut Vec<u8>) {}
}

impl Key for () {
    fn read_key(_bytes: &mut &[u8]) -> Option<Self> {
        Some(())
    }
    fn skip_key(_bytes: &mut &[u8]) -> Option<()> {
        Some(())
    }
}

impl ToValue<()> for () {
    fn write_value(&self, _out: &mut Vec<u8>) {}
}

impl Value for () {
    fn read_value(_bytes: &mut &[u8]) -> Option<Self> {
        Some(())
    }
}

/// Ends bytes inside a key.
const END: [u8; 2] = [0, 0];
/// A zero byte of bytes inside a key.
const ZERO: [u8; 2] = [0, 0xff];

fn write_escaped(mut bytes: &[u8], out: &mut Vec<u8>) {
    while let Some(at) = memchr::memchr(0, bytes) {
        out.extend_from_slice(&bytes[..at]);
        out.extend_from_slice(&ZERO);
        bytes = &bytes[at + 1..];
    }
    out.extend_from_slice(bytes);
    out.extend_from_slice(&END);
}

/// Takes escaped bytes off the start; tells `each` their unescaped pieces.
fn read_escaped(bytes: &mut &[u8], mut each: impl FnMut(&[u8])) -> Option<()> {
    loop {
        let at = memchr::memchr(0, bytes)?;
        each(&bytes[..at]);
        let mark: [u8; 2] = bytes.get(at..at + 2)?.try_into().ok()?;
        *bytes = &bytes[at + 2..];
        match mark {
            END => return Some(()),
            ZERO => each(&[0]),
            _ => return None,
        }
    }
}

impl ToKey<Vec<u8>> for [u8] {
    fn write_key(&self, out: &mut Vec<u8>) {
        write_escaped(self, out);
    }
    fn write_last_key(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self);
    }
}

impl ToKey<Self> for Vec<u8> {
    fn write_key(&self, out: &mut Vec<u8>) {
        write_escaped(self, out);
    }
    fn write_last_key(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self);
    }
}

impl Key for Vec<u8> {
    fn read_key(bytes: &mut &[u8]) -> Option<Self> {
        let mut out = Self::new();
        read_escaped(bytes, |piece| out.extend_from_slice(piece))?;
        Some(out)
    }
    fn read_last_key(bytes: &[u8]) -> Option<Self> {
        Some(bytes.to_vec())
    }
    fn skip_key(bytes: &mut &[u8]) -> Option<()> {
        read_escaped(bytes, |_| ())
    }
}

impl ToKey<String> for str {
    fn write_key(&self, out: &mut Vec<u8>) {
        write_escaped(self.as_bytes(), out);
    }
    fn write_last_key(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.as_bytes());
    }
}

impl ToKey<Self> for String {
    fn write_key(&self, out: &mut Vec<u8>) {
        self.as_str().write_key(out);
    }
    fn write_last_key(&self, out: &mut Vec<u8>) {
        self.as_str().write_last_key(out);
    }
}

impl Key for String {
    fn read_key(bytes: &mut &[u8]) -> Option<Self> {
        Self::from_utf8(Vec::read_key(bytes)?).ok()
    }
    fn read_last_key(bytes: &[u8]) -> Option<Self> {
        Self::from_utf8(bytes.to_vec()).ok()
    }
    fn skip_key(bytes: &mut &[u8]) -> Option<()> {
        Vec::<u8>::skip_key(bytes)
    }
}

fn write_sized(bytes: &[u8], out: &mut Vec<u8>) {
    put_varint(bytes.len() as u64, out);
    out.extend_from_slice(bytes);
}

fn read_sized<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = take_varint(bytes)?;
    take(bytes, usize::try_from(length).ok()?)
}

macro_rules! bytes_value {
    ($($from:ty => $type:ty;)*) => {$(
        impl ToValue<$type> for $from {
            fn write_value(&self, out: &mut Vec<u8>) {
                write_sized(self.as_ref(), out);
            }
            fn write_last_value(&self, out: &mut Vec<u8>) {
                let bytes: &[u8] = self.as_ref();
                out.extend_from_slice(bytes);
            }
        }
    )*};
}

bytes_value! {
    [u8] => Vec<u8>;
    Vec<u8> => Vec<u8>;
    str => String;
    String => String;
}

impl Value for Vec<u8> {
    fn read_value(bytes: &mut &[u8]) -> Option<Self> {
        read_sized(bytes).map(<[u8]>::to_vec)
    }
    fn read_last_value(bytes: &[u8]) -> Option<Self> {
        Some(bytes.to_vec())
    }
}

impl Value for String {
    fn read_value(bytes: &mut &[u8]) -> Option<Self> {
        Self::from_utf8(Vec::read_value(bytes)?).ok()
    }
    fn read_last_value(bytes: &[u8]) -> Option<Self> {
        Self::from_utf8(bytes.to_vec()).ok()
    }
}

/// Any number of values as one. (`Vec<u8>` is a string of bytes.)
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct List<T>(pub Vec<T>);

impl<T, Q: ToValue<T>> ToValue<List<T>> for List<Q> {
    fn write_value(&self, out: &mut Vec<u8>) {
        put_varint(self.0.len() as u64, out);
        for one in &self.0 {
            one.write_value(out);
        }
    }
}

impl<T: Value> Value for List<T> {
    fn read_value(bytes: &mut &[u8]) -> Option<Self> {
        let count = take_varint(bytes)?;
        let mut out = Vec::new();
        for _ in 0..count {
            // What takes no bytes could be there any number of times.
            let before = bytes.len();
            out.push(T::read_value(bytes)?);
            if bytes.len() == before {
                return None;
            }
        }
        Some(Self(out))
    }
}

impl<K, Q: ToKey<K>> ToKey<Option<K>> for Option<Q> {
    fn write_key(&self, out: &mut Vec<u8>) {
        out.push(u8::from(self.is_some()));
        if let Some(key) = self {
            key.write_key(out);
        }
    }
    fn write_last_key(&self, out: &mut Vec<u8>) {
        out.push(u8::from(self.is_some()));
        if let Some(key) = self {
            key.write_last_key(out);
        }
    }
}

impl<K: Key> Key for Option<K> {
    fn read_key(bytes: &mut &[u8]) -> Option<Self> {
        if bool::read_key(bytes)? { K::read_key(bytes).map(Some) } else { Some(None) }
    }
    fn read_last_key(mut bytes: &[u8]) -> Option<Self> {
        if bool::read_key(&mut bytes)? {
            return K::read_last_key(bytes).map(Some);
        }
        bytes.is_empty().then_some(None)
    }
    fn skip_key(bytes: &mut &[u8]) -> Option<()> {
        if bool::read_key(bytes)? { K::skip_key(bytes) } else { Some(()) }
    }
}

impl<V, Q: ToValue<V>> ToValue<Option<V>> for Option<Q> {
    fn write_value(&self, out: &mut Vec<u8>) {
        out.push(u8::from(self.is_some()));
        if let Some(value) = self {
            value.write_value(out);
        }
    }
    fn write_last_value(&self, out: &mut Vec<u8>) {
        out.push(u8::from(self.is_some()));
        if let Some(value) = self {
            value.write_last_value(out);
        }
    }
}

impl<V: Value> Value for Option<V> {
    fn read_value(bytes: &mut &[u8]) -> Option<Self> {
        if bool::read_key(bytes)? { V::read_value(bytes).map(Some) } else { Some(None) }
    }
    fn read_last_value(mut bytes: &[u8]) -> Option<Self> {
        if bool::read_key(&mut bytes)? {
            return V::read_last_value(bytes).map(Some);
        }
        bytes.is_empty().then_some(None)
    }
}

impl<K, Q: ToKey<K>> ToKey<Reverse<K>> for Reverse<Q> {
    fn write_key(&self, out: &mut Vec<u8>) {
        let from = out.len();
        // With the mark of its end, wherever it stands: the complement of nothing is nothing, which must come last here.
        self.0.write_key(out);
        out[from..].iter_mut().for_each(|byte| *byte = !*byte);
    }
}

impl<K: Key> Key for Reverse<K> {
    fn read_key(bytes: &mut &[u8]) -> Option<Self> {
        let plain: Vec<u8> = bytes.iter().map(|byte| !byte).collect();
        let mut rest = &plain[..];
        let key = K::read_key(&mut rest)?;
        *bytes = &bytes[plain.len() - rest.len()..];
        Some(Self(key))
    }
    fn skip_key(bytes: &mut &[u8]) -> Option<()> {
        Self::read_key(bytes).map(drop)
    }
}

macro_rules! tuple {
    ($(($($name:ident $from:ident $at:tt),*; $last:ident $last_from:ident $last_at:tt))*) => {$(
        impl<$($name, $from: ToKey<$name>,)* $last, $last_from: ToKey<$last>> ToKey<($($name,)* $last)> for ($($from,)* $last_from) {
            #[inline]
            fn write_key(&self, out: &mut Vec<u8>) {
                $(self.$at.write_key(out);)*
                self.$last_at.write_key(out);
            }
            #[inline]
            fn write_last_key(&self, out: &mut Vec<u8>) {
                $(self.$at.write_key(out);)*
                self.$last_at.write_last_key(out);
            }
        }
        impl<$($name: Key,)* $last: Key> Key for ($($name,)* $last) {
            fn read_key(bytes: &mut &[u8]) -> Option<Self> {
                Some(($($name::read_key(bytes)?,)* $last::read_key(bytes)?))
            }
            fn read_last_key(mut bytes: &[u8]) -> Option<Self> {
                Some(($($name::read_key(&mut bytes)?,)* $last::read_last_key(bytes)?))
            }
            fn skip_key(bytes: &mut &[u8]) -> Option<()> {
                $($name::skip_key(bytes)?;)*
                $last::skip_key(bytes)
            }
        }
        impl<$($name, $from: ToValue<$name>,)* $last, $last_from: ToValue<$last>> ToValue<($($name,)* $last)>
            for ($($from,)* $last_from)
        {
            #[inline]
            fn write_value(&self, out: &mut Vec<u8>) {
                $(self.$at.write_value(out);)*
                self.$last_at.write_value(out);
            }
            #[inline]
            fn write_last_value(&self, out: &mut Vec<u8>) {
                $(self.$at.write_value(out);)*
                self.$last_at.write_last_value(out);
            }
        }
        impl<$($name: Value,)* $last: Value> Value for ($($name,)* $last) {
            fn read_value(bytes: &mut &[u8]) -> Option<Self> {
                Some(($($name::read_value(bytes)?,)* $last::read_value(bytes)?))
            }
            fn read_last_value(mut bytes: &[u8]) -> Option<Self> {
                Some(($($name::read_value(&mut bytes)?,)* $last::read_last_value(bytes)?))
            }
        }
    )*};
}

tuple! {
    (A QA 0; B QB 1)
    (A QA 0, B QB 1; C QC 2)
    (A QA 0, B QB 1, C QC 2; D QD 3)
    (A QA 0, B QB 1, C QC 2, D QD 3; E QE 4)
}

#[cfg(test)]
#[path = "encode_tests.rs"]
mod tests;
