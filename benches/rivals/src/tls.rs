//! TLS for contenders that do not bring their own: a server makes a certificate, and its client trusts
//! that one alone.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::serve::Listener;
use rcgen::CertifiedKey;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use crate::tcp;

/// The host that certificates are for.
pub(crate) const HOST: &str = "localhost";

/// A certificate and its key, both in PEM.
pub(crate) struct Credentials {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

impl Credentials {
    pub(crate) fn generate() -> Self {
        let CertifiedKey { cert, key_pair } =
            rcgen::generate_simple_self_signed([HOST.to_owned()]).expect("a certificate");
        Self {
            certificate: cert.pem(),
            key: key_pair.serialize_pem(),
        }
    }

    /// A server's address and certificate, in one line.
    pub(crate) fn introduce(&self, address: SocketAddr) -> String {
        format!("{address}|{}", self.certificate.replace('\n', "|"))
    }
}

/// The address and the certificate of a server.
pub(crate) fn introduced(line: &str) -> (&str, String) {
    let (address, certificate) = line.split_once('|').expect("both are told");
    (address, certificate.replace('|', "\n"))
}

/// Accepts connections, and is not done before they are encrypted.
pub(crate) struct Encrypted {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl Encrypted {
    pub(crate) fn new(listener: TcpListener, credentials: &Credentials) -> Self {
        let certificate = certificate(&credentials.certificate);
        let key = PrivateKeyDer::from_pem_slice(credentials.key.as_bytes()).expect("a key");
        let config = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key);
        let config = Arc::new(config.expect("the key is the certificate's"));
        Self {
            listener,
            acceptor: config.into(),
        }
    }
}

impl Listener for Encrypted {
    type Io = server::TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        let (stream, from) = self.listener.accept().await.expect("it listens");
        tcp::without_delay(&stream);
        let stream = self.acceptor.accept(stream).await;
        (stream.expect("the client speaks TLS"), from)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// Dials servers that have this certificate.
pub(crate) fn connector(pem: &str) -> TlsConnector {
    let mut trusted = RootCertStore::empty();
    trusted.add(certificate(pem)).expect("a certificate");
    let config = ClientConfig::builder()
        .with_root_certificates(trusted)
        .with_no_client_auth();
    TlsConnector::from(Arc::new(config))
}

pub(crate) async fn dial(connector: &TlsConnector, address: &str) -> client::TlsStream<TcpStream> {
    let host = ServerName::try_from(HOST).expect("a host");
    let stream = connector.connect(host, tcp::dial(address).await).await;
    stream.expect("the server is trusted")
}

fn certificate(pem: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pem.as_bytes()).expect("a certificate")
}
